"""How many threads HiGHS may be asked for in this process."""

from __future__ import annotations


def highs_threads() -> int:
    """Return 1, or 0 (what the process has already) where HiGHS would refuse 1.

    HiGHS shares one scheduler in a process and refuses to run with another number of threads
    than the first user of it asked for, who may be somebody else's code.
    """
    import highspy

    trial = highspy.Highs()
    trial.setOptionValue("output_flag", False)
    trial.setOptionValue("threads", 1)
    trial.addVar(0.0, 1.0)
    return 0 if trial.run() == highspy.HighsStatus.kError else 1
