"""How many examples a property test tries: all with the profile `full` (`make test-all`), a fixed
tenth otherwise.
"""

from hypothesis import settings


def examples(full: int) -> settings:
    """Settings for a property test of `full` examples. The quick profile, which is the default,
    tries a tenth, at least ten.
    """
    quick = settings.get_current_profile_name() != "full"
    return settings(max_examples=max(10, full // 10) if quick else full)
