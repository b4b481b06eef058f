"""What the suite leaves to the night."""

import itertools

from suite_size import covering


def test_by_day_every_two_settings_meet():
    axes = [("a", "b", "c"), (False, True), (0.0, 0.4), (None, "x", "y", "z")]
    whole = list(itertools.product(*axes))
    chosen = covering(whole, 2)
    assert 12 <= len(chosen) <= len(whole) // 3  # three by four pairs of the widest two
    assert [case for case in whole if case in chosen] == chosen
    for one, other in itertools.combinations(range(len(axes)), 2):
        met = {(case[one], case[other]) for case in chosen}
        assert met == set(itertools.product(axes[one], axes[other]))


def test_by_day_each_setting_is_there():
    whole = list(itertools.product("abc", (1, 2)))
    assert covering(whole, 1) == [("a", 1), ("b", 2), ("c", 1)]
