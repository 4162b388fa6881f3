"""`mmi bench prefill`: its figures on a tiny preset, the extrapolated baseline, the stages of a trace."""

import dataclasses
import json

import pytest

from mmi_jax import AShape, Dense, PatternTable
from mmi_jax.bench.baselines.transformers_model import _read_lines
from mmi_jax.bench.prefill import MIX, DenseBaseline, mixed_table, prefill_program, projection_flops
from mmi_jax.cli import main
from mmi_jax.cli.bench.presets import table_of
from mmi_jax.cli.bench.synthetic_prompts import video_prompt
from mmi_jax.layout import VISION
from models import family_of
from models.interface import HeadShape
from models.qwen2_5_vl import presets
from models.random_weights import random_model
from models.testing import TINY_PRESET


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY_PRESET)
    monkeypatch.setattr("mmi_jax.cli.bench.runner.matmul_tflops_per_s", lambda: 1.0)


@pytest.fixture
def table(tmp_path):
    row = (AShape(128, 256),) * 3 + (Dense(),) * 3
    path = tmp_path / "table.json"
    PatternTable(layers=(row, row)).save(path)
    return path


def run(capsys, *arguments):
    """What the command prints, and its only case."""
    assert (
        main(["bench", "prefill", "--preset", "tiny", "--layers", "1", "--tokens", "1024", *map(str, arguments)]) == 0
    )
    out = capsys.readouterr().out
    return out, json.loads(out.strip().splitlines()[-1])["cases"][0]


@pytest.mark.slow
def test_a_length_has_its_figures_with_dense_and_stages_beside_them(tiny_preset, table, tmp_path, capsys):
    out, case = run(capsys, "--table", table, "--profile", tmp_path / "trace", "--no-check", "--debug")
    assert (case["tokens"], case["padded_tokens"], case["layers"], case["heads"]) == (1024, 1024, 1, "6/2")
    assert case["speedup"] == pytest.approx(case["dense_seconds"] / case["seconds"], rel=0.01)
    assert not case["is_dense_extrapolated"]
    assert case["density_by_pattern"]["AShape"] < 0.75 < case["density_by_pattern"]["Dense"]
    assert case["projection_flops"] == projection_flops(dataclasses.replace(TINY_PRESET, num_layers=1), 1024)
    stages = case["stages"]["seconds"]
    assert not case["stages"]["is_device"] and case["planned_bytes"] > 4 * 1024 * TINY_PRESET.embed_dim
    names = ("norms, projections, rotary", "permute", "attend", "undo", "output projection, MLP")
    assert all(stages[name] > 0 for name in names) and stages["attend"] > stages["permute"]
    assert list(tmp_path.rglob("*.xplane.pb")) and "stages: norms" in out


@pytest.mark.slow
def test_the_mix_is_checked_before_it_is_timed(tiny_preset, capsys):
    _, case = run(capsys, "--check-tokens", "1024", "--no-baseline", "--debug")
    assert "error" not in case["check"], case["check"]
    assert max(case["check"]["relative_error"], case["check"]["relative_error_of_dense"]) < 1e-5
    assert set(case["density_by_pattern"]) == {"Grid", "Grid+slash", "VerticalSlash"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "8b"], "--preset must be one of 3b, 7b"),
        (["--preset", "tiny", "--layers", "3"], "--layers must be at most 2, those of tiny: got 3"),
        (["--preset", "tiny", "--table", "absent.json"], "absent.json"),
        (["--preset", "tiny", "--table", "grid+nope"], "--table must be dense, cases joined by + (of grid, "),
        (["--preset", "tiny", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, got 'int8'"),
        (["--preset", "tiny", "--json-file", "absent/x.json"], "absent/x.json must be in a directory that exists"),
        (["--tokens", "1048577"], "should be less than or equal to 1048576"),
    ],
)
def test_bad_options_end_before_anything_runs(tiny_preset, arguments, message, capsys):
    for command in ("prefill", "first-token"):
        assert main(["bench", command, *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("arguments", [["soak", "--max-tokens", "1048577"], ["soak", "--seed", "-1"]])
def test_no_soak_begins_that_could_not_end(tiny_preset, arguments, capsys):
    assert main(["bench", *arguments, "--preset", "tiny"]) == 2
    assert f"'{arguments[1]}': Input should be" in capsys.readouterr().err


def test_dense_seconds_are_measured_up_to_the_limit_and_extrapolated_above():
    """Linear and quadratic parts are separated by two measurements."""
    measured = []

    def measure(num_tokens):
        measured.append(num_tokens)
        return 3e-6 * num_tokens + 5e-10 * num_tokens**2

    baseline = DenseBaseline(measure=measure, limit=8192)
    assert baseline.of(8192) == {"dense_seconds": round(measure(8192), 4), "is_dense_extrapolated": False}
    far = baseline.of(2**20)
    assert far["dense_seconds"] == pytest.approx(measure(2**20), rel=1e-4) and far["dense_measured_at"] == [4096, 8192]
    assert measured.count(4096) == 1
    failing = DenseBaseline(measure=lambda _: 1 / 0, limit=8192)
    assert failing.of(16384) == {"dense_error": "ZeroDivisionError: division by zero"}


def test_the_prompt_is_a_video_with_text_around_it():
    prompt = video_prompt(TINY_PRESET, 2048)
    vision = prompt.layout.modality[0] == VISION
    assert prompt.tokens.shape == (1, 2048) and vision.sum() == 5 * 256 and not vision[:65].any()
    assert (prompt.layout.row[0][vision].max(), prompt.layout.frame[0][vision].max()) == (15, 4)
    assert (prompt.tokens < 225).all() and prompt.rope_pos[0, 0, 65 + 256] == prompt.rope_pos[0, 0, 65] + 2
    with pytest.raises(ValueError, match="hold a frame of 256, got 700"):
        video_prompt(TINY_PRESET, 700)


def test_the_program_whose_start_is_timed_is_the_one_that_runs():
    family = family_of(TINY_PRESET)
    model = family.without_vision(family.abstract_model(TINY_PRESET))
    program, shapes = prefill_program(model, mixed_table(2, 6), 2000)
    assert program.layers == mixed_table(2, 6).layers and shapes.x.shape == (1, 2048, TINY_PRESET.embed_dim)
    with pytest.raises(ValueError, match="one for each of the 6 query heads, got 1"):
        random_model(TINY_PRESET, shapes=(HeadShape(),), has_vision=False)


def test_tables_are_named_by_the_cases_of_plans():
    table = table_of("grid-slash+vertical-slash", TINY_PRESET)
    assert table.model == "grid-slash+vertical-slash" and table.layers[0] == table.layers[1]
    assert table.layers[0] == (MIX.patterns[1],) * 3 + (MIX.patterns[2],) * 3
    assert table_of("mix", TINY_PRESET) == mixed_table(2, 6) and mixed_table(2, 6).layers[0] == MIX.per_head(6)[0]


def test_rows_of_transformers_are_read_from_among_its_warnings():
    assert _read_lines('warning\n{"tokens": 5, "seconds": 1.0}\n') == [{"tokens": 5, "seconds": 1.0}]
