"""Stages of a trace: from the scopes of a program's instructions to the kernels that ran."""

import jax
import jax.numpy as jnp
import pytest

from mmi_jax.engine.reporting.profiling import _Kernel, _stages_in_order, _stages_of, profiled

TEXT = """
HloModule jit_run
%body (p: f32[4]) -> f32[4] {
  ROOT %loop_add_fusion.3 = f32[4]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(run)/while/body/mmi.plan/mmi.estimate/add"}
}
ENTRY %main {
  %while.1 = (s32[], f32[4]{0}) while(%t), condition=%c, body=%body, metadata={op_name="jit(run)/mmi.mlp/while"}
  %copy.5 = f32[4]{0} copy(%x), metadata={op_name="jit(run)/slice"}
  %gemm-fusion.2 = f32[4]{0} fusion(%x), kind=kCustom, metadata={op_name="jit(run)/while/body/mmi.mlp/dot_general"}
}
"""  # noqa: E501


def kernel(name: str, instruction: str | None = None, module: str = "jit_run", path: str = "") -> _Kernel:
    return _Kernel(name=name, instruction=instruction or name, module=module, path=path, start=0.0, duration=1.0)


def test_an_instruction_belongs_to_its_innermost_scope():
    stage_of, holders = _stages_of([TEXT])
    assert stage_of["loop_add_fusion.3"] == stage_of["loop_add_fusion_3"] == "estimates"
    assert stage_of["gemm-fusion.2"] == stage_of["gemm_fusion_2"] == "output projection, MLP"
    assert stage_of["copy.5"] == "rest" and holders == {"while.1"}


def test_kernels_find_their_stage_by_name_scope_program_or_neighbour():
    """In a recorded sequence (a command buffer) a kernel bears its fusion's name, a library's kernel none."""
    stage_of, _ = _stages_of([TEXT])
    timeline = [
        kernel("nvjet_sm90", "command_buffer_4"),
        kernel("gemm_fusion_2", "command_buffer_4"),
        kernel("nvjet_sm90", "command_buffer_4"),
        kernel("loop_add_fusion_3", "command_buffer_5"),
        kernel("block_sparse_attention_mosaic_gpu_kernel", "command_buffer_6"),
        kernel("MemcpyD2D", "copy.5"),
        kernel("whatever", path="jit(run)/mmi.undo/gather"),
        kernel("fusion_7", module="jit__encode_batch"),
        kernel("nvjet_sm90", module="jit__einsum"),
    ]
    mlp = "output projection, MLP"
    expected = [mlp, mlp, mlp, "estimates", "attend", "rest", "undo", "vision tower", "rest"]
    assert _stages_in_order(timeline, stage_of) == expected


def test_a_trace_is_written_and_read(tmp_path):
    def work(x):
        with jax.named_scope("mmi.attend"):
            x = jax.lax.fori_loop(0, 20, lambda _, x: jnp.sin(x @ x), x)
        with jax.named_scope("mmi.undo"):
            return jnp.cos(x) * 2

    x = jnp.ones((300, 300), jnp.float32)
    program = jax.jit(work).lower(x).compile()
    result, times = profiled(lambda: program(x), tmp_path / "trace", lambda: [program.as_text()])
    assert result.shape == x.shape and not times.is_device
    assert times.seconds["attend"] > times.seconds["undo"] > 0
    assert times.seconds["attend"] < 20 * times.span, "a loop is not counted in addition to what it holds"
    assert times.to_json()["seconds"]["attend"] > 0 and list(times.directory.rglob("*.xplane.pb"))


def test_a_trace_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    """A full disk: the profiler only logs that it could not write."""

    class Nothing:
        def __init__(self, _):
            pass

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(jax.profiler, "trace", Nothing)
    with pytest.raises(ValueError, match="must leave a trace in .*: got none; is the disk full?"):
        profiled(lambda: jnp.zeros(1), tmp_path, list)
