"""The offline search: which pattern each head gets (paper section 3.3, Alg. 4, App. C.5). Read in this order:

candidates   what is tried
trials       one candidate in one use, on all heads: the paper's three steps
capture      a prompt's attention inputs, one layer at a time
measure      errors on the output and visited tiles of a trial
scores       those of several prompts; what each head may do
joint        the inter-modality step: which combinations are worth a trial
run          all of it on a model, resumable (journal)
costs        tiles at the price of a device
budget       one option per head within a budget
best         the dial, and the table that keeps to it on every prompt
minference   tables that MInference published
"""

from mmi_jax.search.best import Best as Best
from mmi_jax.search.best import TargetDensity as TargetDensity
from mmi_jax.search.best import TargetSpeedup as TargetSpeedup
from mmi_jax.search.best import best_choice as best_choice
from mmi_jax.search.candidates import Candidates as Candidates
from mmi_jax.search.journal import Journal as Journal
from mmi_jax.search.run import Search as Search
