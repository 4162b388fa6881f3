"""The picture of a head's mask: a public function that imports matplotlib only when it is called."""

from typing import TYPE_CHECKING

from mmi_jax.layout import TokenLayout
from mmi_jax.method.plan import Plan
from pallas_kernels.notation import AnyArray, Bool

if TYPE_CHECKING:
    import matplotlib.figure


def plot_mask(
    plan_or_mask: Plan | Bool[AnyArray, "*h t s"],
    head: int = 0,
    layout: TokenLayout | None = None,
    *,
    title: str | None = None,
) -> "matplotlib.figure.Figure":
    """A figure of the pairs that one head attends: queries downwards, keys to the right, both in prompt order.

    Of a plan a second picture stands at its right, the same pairs as the kernel computes them, tile by tile: rows and
    keys regrouped, gathered columns last. A pair has the same colour in both: that of the keys through which it is
    computed. Prompts of any length are drawn, several tokens to a pixel where they are long.

    Args:
      plan_or_mask: a plan of one example and a whole prompt, or its mask: `[t, s]` of one head, or `[h, t, s]` of all
        as `Plan.to_mask()` gives it; True where the query attends the key.
      head: which head of the plan, or of a mask with heads.
      layout: of the prompt, fields `[t]`; names text and video along the axes where it is given.
      title: above the picture.

    Raises:
      ValueError: no such head.
      ImportError: matplotlib is not installed.
    """
    from mmi_jax.plots.mask_figure import figure_of_mask, figure_of_plan

    num_heads = len(plan_or_mask.q_pos) if isinstance(plan_or_mask, Plan) else (1, *plan_or_mask.shape)[-3]
    if not 0 <= head < num_heads:
        raise ValueError(f"head must be one of the {num_heads} that are given, got {head=}")
    title = title or f"head {head}"
    if isinstance(plan_or_mask, Plan):
        return figure_of_plan(plan_or_mask, head, layout, title=title)
    return figure_of_mask(plan_or_mask[head] if plan_or_mask.ndim == 3 else plan_or_mask, layout, title=title)
