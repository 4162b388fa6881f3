import json

import numpy as np
import pytest
import tokenizers

from models.huggingface.tokenizer import Tokenizer
from models.huggingface.train_tokenizer import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    return train_tokenizer("the quick brown fox jumps over the lazy dog, the dog sleeps")


@pytest.fixture
def directory(tmp_path, backend):
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


@pytest.mark.parametrize(
    "text", ["the quick dog", "Ünïcödé 漢字 🎬\n\ttabs", "", "2 + 2 = 4", "<|im_start|>user\nhi<|im_end|>"]
)
def test_text_comes_back(directory, text):
    tokenizer = Tokenizer.from_directory(directory)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text


def test_special_tokens_are_one_id_each_and_can_be_left_out(directory):
    tokenizer = Tokenizer.from_directory(directory)
    tokens = tokenizer.encode("<|im_start|>the dog<|im_end|>")
    assert tokens[0] == tokenizer.token_id("<|im_start|>")
    assert tokens[-1] == tokenizer.token_id("<|im_end|>")
    assert tokenizer.token_text(int(tokens[-1])) == "<|im_end|>"
    assert tokenizer.decode(tokens) == "the dog"


def test_ids_and_tokens_that_do_not_exist(directory):
    tokenizer = Tokenizer.from_directory(directory)
    with pytest.raises(ValueError, match=r"has no token '<\|nothing\|>'"):
        tokenizer.token_id("<|nothing|>")
    with pytest.raises(ValueError, match=r"has no id 151655: its vocabulary holds \d+ tokens"):
        tokenizer.token_text(151655)


def test_the_template_renders_with_and_without_a_generation_prompt(directory):
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.render(CHAT) == "[user] hello\n>"
    assert tokenizer.render(CHAT, add_generation_prompt=False) == "[user] hello\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.json", {"chat_template": "A"}),
        ("tokenizer_config.json", {"chat_template": "A"}),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "rag", "template": "B"}, {"name": "default", "template": "A"}]},
        ),
    ],
)
def test_where_a_template_may_stand(directory, name, content):
    (directory / "chat_template.jinja").unlink()
    (directory / name).write_text(json.dumps(content))
    assert Tokenizer.from_directory(directory).render(CHAT) == "A"


def test_the_template_may_name_special_tokens(directory):
    (directory / "chat_template.jinja").write_text("{{ eos_token }}{{ pad_token }}")
    fields = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>", "special": True}, "bos_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.render(CHAT) == "<|im_end|><|endoftext|>"
    assert tokenizer.special_id("eos_token") == tokenizer.token_id("<|im_end|>")
    assert tokenizer.special_id("bos_token") is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "must render the messages"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_fails_or_reaches_out(directory, template, message):
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_directory(directory).render(CHAT)


def test_missing_and_corrupt_files(directory, tmp_path):
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="must bring a chat template in one of"):
        Tokenizer.from_directory(directory)
    (directory / "chat_template.json").write_text("{")
    with pytest.raises(ValueError, match="chat_template.json must be JSON"):
        Tokenizer.from_directory(directory)
    (directory / "chat_template.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        Tokenizer.from_directory(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="must be in the format of `tokenizers`"):
        Tokenizer.from_directory(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="must have the file tokenizer.json, got none"):
        Tokenizer.from_directory(directory)
