"""What a stage says of itself: where its inputs come from."""

from types import SimpleNamespace

import pytest

from thinkimg.errors import UserError
from thinkimg.stages.build import trace
from thinkimg.stages.stage import Lineage


class Line:
    """Policies, each trained from the one before; in place of a store."""

    def __init__(self, count: int):
        self.policies = [
            SimpleNamespace(number=i, manifest={"recipe": {"inputs": {"policy": {}} if i else {}}})
            for i in range(count)
        ]

    def origin(self, artifact, role):
        if role not in artifact.manifest["recipe"]["inputs"]:
            raise UserError("it was not made from that")
        return self.policies[artifact.number - 1]


@pytest.mark.parametrize("number", range(4))
def test_the_first_of_a_line_is_found_from_anywhere_also_from_itself(number):
    line = Line(4)
    given = {"player": line.policies[number]}
    assert trace(Lineage("player", "policy", first=True), given, line).number == 0
    if number:
        assert trace(Lineage("player", "policy"), given, line).number == number - 1
    else:
        with pytest.raises(UserError):
            trace(Lineage("player", "policy"), given, line)
