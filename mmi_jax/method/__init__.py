"""The method, from a prompt's layout to attention. Read the files in the order of the data:

1. `token_groups`: a group id per token, from the layout alone: the same place in every frame, say.
2. `kv_views`: the orders of the kv tokens that patterns need, and where each group lies in them.
3. `estimate`: which tokens and groups stand out to the last queries of a head.
4. `query_parts`: the scope that a pattern plans in, and the parts of the queries that it answers with.
5. `patterns`: one file for each pattern, registered once; each turns a scope into parts.
6. `head_plan`: parts of one head become row order, positions and runs of kv blocks, and these block lists.
7. `plan`: the plans of all heads in one `BlockIndex`.
8. `permutation`: query rows there and back, passes over the same queries merged into one softmax.
9. `attention`: plan, permute, attend, undo.

On a first reading of `patterns`, `grid`, `vertical_slash`, `streaming` and `boundary` are the paper's; `static` and
`block_top_k` are baselines. What a pattern says of itself beyond `views` and `parts` is for search and pictures.

Around it: `dispatch` is the door, `sparse_attention`, which may take the vendor's dense kernel instead; `checks`
refuses what does not fit; `tables` holds a pattern for every layer and head. Runs become block lists in
`pallas_kernels.block_lists`, which knows no pattern.
"""
