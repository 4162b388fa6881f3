"""The offline search: which pattern each head gets (paper section 3.3, Alg. 4, App. C.5). In the order of reading:

candidates     patterns that are tried
activations    queries, keys, values and dense output of a prompt, one layer at a time
trials/        one candidate in one use, on all heads (the paper's three steps); its errors and visited tiles; a journal
scores         those of several prompts, and each head's options
joint_trials   the inter-modality step: which combinations are worth a trial
importance     weights of heads, by what the ablation of each one changes in the answers
run            all of it on a model, resumable: a `Search`
costs          tiles at the price of a device
knapsack       one option per head within a budget
choice         a target that holds on every prompt, and the `SearchResult` that meets it
baselines/     published tables, and families of patterns at equal cost, to compare a searched table with
"""

from mmi_jax.search.candidates import Candidates as Candidates
from mmi_jax.search.choice import SearchResult as SearchResult
from mmi_jax.search.choice import TargetDensity as TargetDensity
from mmi_jax.search.choice import TargetSpeedup as TargetSpeedup
from mmi_jax.search.choice import choose_patterns as choose_patterns
from mmi_jax.search.run import Search as Search
from mmi_jax.search.trials.journal import Journal as Journal
