"""`mmi prefill`: the demo whole, then its options and its refusals."""

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import mmi_jax
from mmi_jax import AShape, Blocks, PatternTable, TriShape, VerticalSlash
from mmi_jax.cli import compile_cache, main, pictures
from mmi_jax.cli.prefill.demo import NOTE, PROMPT, demo_table, right_answer
from mmi_jax.cli.prefill.prompt import arrange
from mmi_jax.plots.head_plans import plan_of_heads
from models.assets.demo import DEMO_MODEL, DEMO_VIDEO
from models.media.video import read_video
from models.qwen2_5_vl.checkpoints.dialects import read_config
from models.qwen2_5_vl.checkpoints.weights import load
from models.qwen2_5_vl.processing.processor import Processor
from models.testing.random_checkpoint import write_random_checkpoint

FEW_FRAMES = ("--max-frames", "4")  # 128 tokens of the random model


@dataclasses.dataclass(frozen=True)
class Demo:
    """A finished `mmi prefill --demo --json`: what it printed, and where its files are."""

    printed: dict
    stderr: str
    directory: Path
    cache: Path


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Demo:
    directory, cache = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("compiled")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(
            [
                "prefill",
                "--demo",
                "--json",
                "--max-frames",
                "144",
                "--prompt",
                "Which digit is on the blue card?",
                "--demo-dir",
                str(directory),
                "--cache-dir",
                str(cache),
            ]
        )
    assert status == 0, err.getvalue()
    return Demo(json.loads(out.getvalue()), err.getvalue(), directory, cache)


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A directory with a random model, and one for compiled programs."""

    model: str
    cache: Path


@pytest.fixture(scope="session")
def random(tmp_path_factory) -> RandomModel:
    model = tmp_path_factory.mktemp("random") / "model"
    write_random_checkpoint(model)
    return RandomModel(str(model), tmp_path_factory.mktemp("programs"))


@pytest.fixture
def run(random, capsys, monkeypatch):
    """Runs `mmi prefill` with the random model: the JSON object it printed."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: str) -> dict:
        options = [
            "--model",
            random.model,
            "--cache-dir",
            str(random.cache),
            "--dtype",
            "float32",
            "--max-new-tokens",
            "2",
        ]
        status = main(["prefill", *options, "--json", *arguments])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return json.loads(printed.out)

    return call


@pytest.fixture
def photo(tmp_path, rng) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(rng.integers(0, 256, (100, 100, 3), np.uint8)).save(path)
    return path


@pytest.mark.slow
def test_the_demo_reports_every_stage_and_compares_with_dense(demo):
    report = demo.printed["report"]
    assert report["tokens"]["vision"] == 144 / 2 * 16
    assert list(report["seconds"]) == ["media decoding", "weights", "vision", "compile", "prefill", "new tokens"]
    assert all(seconds > 0 for seconds in report["seconds"].values())
    assert set(demo.printed["dense_seconds"]) == {"vision", "compile", "prefill"}
    assert np.shape(report["density"]) == np.shape(report["recall"]) == (8, 6)
    assert 0 < np.min(report["density"]) < 1
    assert set(report["patterns"][0]) == {"TriShape", "Grid", "VerticalSlash"}
    agreement = demo.printed["agreement"]
    assert 0 < agreement["hidden_error"] < 1 and 0 <= agreement["top5_overlap"] <= 1 and agreement["kl"] > 0
    assert demo.printed["note"] == NOTE


@pytest.mark.slow
def test_the_demo_answers_a_question_about_its_video(demo):
    assert demo.printed["text"] == demo.printed["right_answer"] == "3"
    assert len(demo.printed["new_tokens"]) == 2, "the answer, and its end"
    assert right_answer(PROMPT) == "7" and right_answer("What happens?") is None


@pytest.mark.slow
def test_with_json_progress_and_tables_go_to_stderr(demo):
    for text in ("loading weights", "sparse prefill", "agreement with dense", "estimated recall"):
        assert text in demo.stderr


@pytest.mark.slow
def test_the_demo_draws_its_patterns(demo):
    names = sorted(path.name for path in demo.directory.glob("*.png"))
    assert names == ["density.png", *(f"mask-layer0-head{n}.png" for n in range(3)), "patterns.png"]
    assert demo.printed["plots"] == [str(demo.directory / Path(path).name) for path in demo.printed["plots"]]
    for name in names:
        with Image.open(demo.directory / name) as picture:
            assert picture.width > 500 and picture.height > 300
    assert not list(demo.directory.glob(".*"))


@pytest.mark.slow
def test_the_demo_keeps_compiled_programs_and_leaves_jax_as_it_was(demo):
    contents = compile_cache.cache_contents(demo.cache)
    assert contents.num_programs > 0 and contents.num_bytes > 0
    assert jax.config.jax_compilation_cache_dir != str(demo.cache)


@pytest.mark.slow
def test_videos_images_and_text_stand_where_the_marks_are(run, photo, tmp_path):
    video, trace = str(DEMO_VIDEO), tmp_path / "trace"
    printed = run(
        *FEW_FRAMES, "--video", video, "--image", str(photo), "--video", video,
        "--prompt", "First {video} then {image} and {video}: which?", "--pattern", "TriShape:sink=32,local=64,last=32",
        "--profile", str(trace),
    )  # fmt: skip
    assert list(trace.rglob("*.xplane.pb")) and not printed["stages"]["is_device"]
    assert all(printed["stages"]["seconds"][stage] > 0 for stage in ("vision tower", "attend", "recall measurement"))
    assert printed["report"]["tokens"]["vision"] == 2 * 128 + 64
    assert printed["videos"] == [video, video] and printed["images"] == [str(photo)]
    assert printed["agreement"] is None and printed["plots"] == []
    assert set(sum(printed["report"]["patterns"], [])) == {"TriShape"}


def test_text_alone_is_a_prompt(run):
    printed = run("--prompt", "Only words here.")
    assert set(printed["report"]["tokens"]) == {"text"}
    assert set(sum(printed["report"]["patterns"], [])) == {"Dense"}
    assert len(printed["new_tokens"]) == 2


def test_sampling_follows_its_seed(run):
    hot = ("--prompt", "Only words here.", "--temperature", "5", "--seed")
    answers = [run(*hot, seed)["new_tokens"] for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.slow
def test_a_table_and_chunks_are_obeyed(run, tmp_path):
    heads = (AShape(sink=16, local=128),) * 8
    PatternTable(layers=(heads,) * 3 + ((TriShape(sink=16, local=64, last=32),) * 8,)).save(tmp_path / "t.json")
    options = (*FEW_FRAMES, "--video", str(DEMO_VIDEO), "--prompt", "What?", "--table", str(tmp_path / "t.json"))
    report = run(*options, "--chunk-tokens", "128")["report"]
    assert [heads[0] for heads in report["patterns"]] == ["AShape"] * 3 + ["TriShape"]


def test_without_json_the_report_is_on_stdout(random, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    options = ["--cache-dir", str(random.cache), "--dtype", "float32", "--max-new-tokens", "2"]
    options += ["--profile", str(tmp_path)]
    assert main(["prefill", "--model", random.model, "--prompt", "Only words here.", *options]) == 0
    printed = capsys.readouterr()
    for text in (
        "stage, by the profiler",
        "seconds of the host's threads",
        f"trace in {tmp_path}",
        "padded to",
        "new tokens",
        "Dense x 8",
        "min / mean / max over heads",
        "Dense()",
        "answer: ",
    ):
        assert text in printed.out
    assert "loading weights" in printed.err


@pytest.mark.slow
def test_a_traced_plan_is_the_one_that_prefill_ran(random):
    model, processor = load(random.model, dtype=jnp.float32), Processor.from_directory(random.model)
    prompt = processor([read_video(DEMO_VIDEO, fps=2.0, max_frames=8, resize=processor.fit_frame), "What?"])
    blocks = Blocks(q=32, kv=16)
    first, others = (AShape(sink=16, local=64),) * 8, (VerticalSlash(vertical=16, slash=32, local=16),) * 8
    table = PatternTable(layers=(first, others, others, others))
    report = mmi_jax.prefill(model, prompt, table=table, blocks=blocks).report
    plan = plan_of_heads(model, prompt, table, layer=1, heads=[5, 0], blocks=blocks)
    np.testing.assert_allclose(plan.density(), report.density[1, [5, 0]], rtol=1e-6)
    assert len(set(report.density[1].tolist())) > 1
    with pytest.raises(ValueError, match="the table has 4 layers of 8 heads: got layer=4"):
        plan_of_heads(model, prompt, table, layer=4, heads=[0])


REFUSED = {
    "no model": ([], "prefill needs --model"),
    "unknown model": (["--model", "/no/such/model"], "a model is a directory or a Hugging Face repository"),
    "demo and model": (["--demo", "--model", "x"], "--demo brings its own model"),
    "unknown pattern": (
        ["--model", "MODEL", "--pattern", "Spiral"],
        "unknown pattern 'Spiral': expected one of AShape,",
    ),
    "unknown field": (
        ["--model", "MODEL", "--pattern", "AShape:locl=3"],
        "AShape has unknown keys locl: known keys are",
    ),
    "two patterns": (
        ["--model", "MODEL", "--pattern", "Grid", "--table", "t"],
        "--table and --pattern exclude each other",
    ),
    "no table": (["--model", "MODEL", "--table", "/no/table.json"], "/no/table.json: cannot read a pattern table"),
    "table of another model": (
        ["--model", "MODEL", "--prompt", "a", "--table", "TABLE"],
        "expected 4 layers of 8 heads, got 1 layers of 1 heads",
    ),
    "no video": (["--model", "MODEL", "--video", "/no/video.mp4"], "no such file: path='/no/video.mp4'"),
    "no picture": (["--model", "MODEL", "--image", "TABLE"], "an image must be in a format that Pillow reads"),
    "zero fps": (["--model", "MODEL", "--video", "VIDEO", "--fps", "0"], "fps must be a positive finite number"),
    "marks": (
        ["--model", "MODEL", "--prompt", "a {image} b"],
        "a prompt with marks must have one {image} for each --image: expected 0, got 1",
    ),
    "nothing to say": (["--model", "MODEL"], "a prompt must hold text, an image or a video"),
    "temperature": (["--model", "MODEL", "--prompt", "a", "--temperature", "-1"], "sampling needs max_new_tokens >= 0"),
    "chunks": (
        ["--model", "MODEL", "--prompt", "a", "--chunk-tokens", "100"],
        "chunk_tokens must be a positive multiple",
    ),
    "plots in a file": (["--model", "MODEL", "--prompt", "a", "--plots", "TABLE"], "--plots must name a directory"),
    "trace under a file": (  # before the model is looked for, whose lack is an error too
        ["--model", "/no/such/model", "--prompt", "a", "--profile", "UNDER"],
        "--profile must name a directory, got",
    ),
    "trace in a read-only directory": (
        ["--model", "/no/such/model", "--prompt", "a", "--profile", "/proc/trace"],
        "--profile must name a directory that can be written, got '/proc/trace'",
    ),
    "no such layer": (
        ["--model", "MODEL", "--prompt", "a", "--plots", "PLOTS", "--plot-layer", "4"],
        "--plot-layer must be a layer of the model, 0 to 3: got 4",
    ),
    "truncated weights": (["--model", "BROKEN", "--prompt", "a"], "model.safetensors"),
    "unknown option": (["--modle", "x"], "No such option: --modle"),
    "no number": (["--fps", "fast"], "--fps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_gives_one_line_and_status_2(random, capsys, tmp_path, name):
    arguments, message = REFUSED[name]
    PatternTable(layers=((AShape(),),)).save(tmp_path / "table.json")
    places = {"MODEL": random.model, "TABLE": tmp_path / "table.json", "VIDEO": DEMO_VIDEO, "PLOTS": tmp_path / "plots"}
    places["UNDER"] = tmp_path / "table.json" / "trace"
    if "BROKEN" in arguments:
        places["BROKEN"] = shutil.copytree(random.model, tmp_path / "broken")
        weights = tmp_path / "broken" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    before = sorted(tmp_path.rglob("*"))
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    assert main(["prefill", *arguments, "--cache-dir", str(random.cache)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    last = printed.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in printed.err
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_shows_the_error_itself(random):
    with pytest.raises(ValueError, match="unknown pattern 'Spiral'"):
        main(["prefill", "--model", random.model, "--pattern", "Spiral", "--debug", "--cache-dir", str(random.cache)])


def test_a_failed_picture_leaves_no_file(tmp_path, monkeypatch):
    def fail(_, path):
        Path(path).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        pictures.write_figure(tmp_path / "a.png", Figure())
    assert list(tmp_path.iterdir()) == []


def test_the_demo_table_fits_the_demo_model():
    config = read_config(DEMO_MODEL)
    demo_table().check_fits(num_layers=config.num_layers, num_heads=config.num_heads)


def test_parts_without_marks_put_media_first():
    assert arrange("why?", videos=["v", "w"], images=["i"]) == ["v", "w", "i", "why?"]
    assert arrange(" ", videos=["v"], images=[]) == ["v"]


def test_parts_with_marks_follow_them():
    parts = arrange("{video}then {image}, {video}", videos=[1, 2], images=[3])
    assert parts == [1, "then ", 3, ", ", 2]
    with pytest.raises(ValueError, match="one {video} for each --video: expected 2, got 1 in"):
        arrange("{video}{image}", videos=[1, 2], images=[3])
