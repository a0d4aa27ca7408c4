"""Other predictors as a user would pick them, to be measured beside ours by `efficiency --command`.

Each runs in a virtual environment of its own (`requirements.txt` here): nothing else imports this
room. Takes folders of CT volumes; gives label maps of seeded random weights, which mean nothing
(their time does: it does not depend on the weights). `benchmark/results/peers/` has the commands.
"""
