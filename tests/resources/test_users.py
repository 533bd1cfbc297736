"""The engine's users: none finds other weights than it asked for, whatever the others ask."""

from hypothesis import given
from hypothesis import strategies as st

from thinkimg.engine.users import Users

STEPS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["join", "leave"])), max_size=40)


@given(STEPS, st.lists(st.sampled_from("ab"), min_size=6, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6))
def test_all_who_have_the_servers_need_one_version_and_they_are_widened_for_one_alone(steps, versions, fits):
    users, having = Users(), set()
    for user, step in steps:
        if step == "leave":
            users.leave(user)
            having.discard(user)
            continue
        others = {versions[other] for other in having}
        granted = users.join(user, versions[user], lambda user=user: fits[user])
        assert granted == (not others or (others == {versions[user]} and fits[user]))
        having |= {user} if granted else set()
    for user in having:
        users.leave(user)
    assert users.join("next", "c", lambda: False)
