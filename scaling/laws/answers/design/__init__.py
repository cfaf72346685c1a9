"""The next run: which candidates narrow what is asked of a law most for their cost, and when to stop.

``target`` is what is asked, ``candidates`` the runs and their cost, ``beliefs`` what the fitted forms know of both,
``proposal`` the order in which runs are bought, ``of_groups`` that of the runs of two groups, ``certificate`` what no
order can do, ``mending`` the run without which nothing is known, ``orders`` what other orders would have left.
"""

from scaling.laws.answers.design.candidates import Candidates
from scaling.laws.answers.design.certificate import Certificate
from scaling.laws.answers.design.of_groups import propose_of_groups
from scaling.laws.answers.design.proposal import Proposal, Step, propose
from scaling.laws.answers.design.target import Target

__all__ = ["Candidates", "Certificate", "Proposal", "Step", "Target", "propose", "propose_of_groups"]
