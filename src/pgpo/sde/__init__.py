"""Which SDE does PGPO follow? A bench without sampling noise.

    transfer.py     chain and SDE as operators on a grid
    problem.py      a minimal language model, and the real torch step on it
    theorem.py      drifts and diffusions
    experiments.py  the rows: chain, equation, claimed and true order
    kink.py         the counterexample for a law with a kink
    facts.py        numbers with closed forms: engine, noise floor, batch size, weight decay
    trust.py        measured trust: what K estimates, what a step brings, the loop of student and teacher
    orders.py       measuring the order: slopes, expansion, verdict
    figure.py       error against eta
    verify.py       `pgpo sde`: all rows

The theorem and its proof are in docs/THEOREM.md.
"""
