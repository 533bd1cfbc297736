"""The forms of the flows: what a deployment asks for, and which limits a server checks before it schedules anything.

After a deliberate change `python tests/support/forms.py --write` records them.
"""

import pytest
from forms import FORMS, form, recorded


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_the_recorded_one(name):
    found, expected = form(name), recorded()[name]
    assert found == expected
    assert list(found["fields"]) == list(expected["fields"])  # their order
