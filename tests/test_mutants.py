"""The list of seeded faults fits the project it is for; `mutants.py` runs it."""

import mutants


def test_every_fault_can_be_planted():
    faults = mutants.read_faults()
    assert len(faults) >= 60
    assert mutants.mistakes(faults) == []
