"""WebShop: pages, goals and rewards equal those recorded from the original (`golden/`), and search equals Lucene's."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TESTS

from aem_exp.config import instantiate, load, notes
from aem_exp.core import disk
from aem_exp.core.errors import ConfigError
from aem_exp.envs.webshop import analyzer, catalogue, generated, goals, search
from aem_exp.envs.webshop.catalogue import Product, load_catalogue
from aem_exp.envs.webshop.goals import Goals, draw_prices, load_noun_tagger, score, token_set_ratio
from aem_exp.envs.webshop.shop import Shop
from aem_exp.envs.webshop.world import Generated, WebShop
from aem_exp.envs.workers import WorkerPool

GOLDEN = TESTS / "golden"  # forty difficult products, played in the original with `nouns: words` and seed 7
FILES = ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AEM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("WEBSHOP_DATA", raising=False)
        yield


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The forty products as official files."""
    folder = tmp_path_factory.mktemp("official")
    recorded = json.loads((GOLDEN / "webshop_synthetic.json").read_text())
    for name in FILES:
        (folder / name).write_text(json.dumps(recorded[name]))
    return folder


# Text analysis, compared with Lucene's analyzer in Anserini 0.14.3.

ANALYSED = json.loads((GOLDEN / "lucene_words.json").read_text())  # text, its terms


@pytest.mark.parametrize(("text", "terms"), ANALYSED)
def test_texts_are_analysed_as_in_lucene(text, terms):
    assert " ".join(analyzer.analyze(text)) == terms


@settings(max_examples=200, derandomize=True)
@given(text=st.text(max_size=60))
def test_any_text_can_be_analysed(text):
    terms = analyzer.analyze(text)
    assert all(terms) and all(len(term) <= analyzer.MAX_TOKEN_CHARACTERS for term in terms)


# Search.


def lucene(texts, asins, query, count):
    """A reference implementation of Lucene's BM25, document by document."""
    docs = [analyzer.analyze(text) for text in texts]
    used = sum(bool(doc) for doc in docs)
    f32 = lambda x: struct.unpack("f", struct.pack("f", x))[0]  # noqa: E731
    mean = f32(sum(map(len, docs)) / used)
    found = []
    for doc, asin in zip(docs, asins, strict=True):
        length = search._decode_length(search._encode_length(len(doc)))
        cache = np.float32(1) / (
            np.float32(0.9)
            * ((np.float32(1) - np.float32(0.4)) + np.float32(0.4) * np.float32(length) / np.float32(mean))
        )
        total, counts = 0.0, Counter(doc)
        for term, times in Counter(analyzer.analyze(query)).items():
            if counts[term]:
                having = sum(term in other for other in docs)
                weight = np.float32(times) * np.float32(math.log(1 + (used - having + 0.5) / (having + 0.5)))
                total += float(weight - weight / (np.float32(1) + np.float32(counts[term]) * cache))
        if total:
            found.append((-f32(total), asin))
    return [asin for _, asin in sorted(found)][:count]


@pytest.mark.slow
def test_results_are_ranked_by_lucenes_formula(tmp_path):
    random = Random(0)
    words = [f"word{i}" for i in range(60)] + ["running", "shoes", "the", "red"]
    texts = [" ".join(random.choices(words, k=random.choice((0, 3, 20, 45, 90, 300)))) for _ in range(120)]
    asins = ["".join(random.choices("B0XYZ123", k=10)) for _ in texts]
    search.build_index(tmp_path, texts, asins)
    index = search.Index(tmp_path)
    for _ in range(40):
        query = " ".join(random.choices([*words, "nothing"], k=random.randint(1, 6)))
        assert [asins[i] for i in index.search(query, 50)] == lucene(texts, asins, query, 50)
    assert index.search("the of", 50) == index.search("", 50) == index.search("unheard", 50) == []


def test_lengths_are_encoded_as_in_lucene():
    assert [search._decode_length(search._encode_length(n)) for n in (0, 23, 39, 40, 41, 100, 1000, 123_456)] == [
        *(0, 23, 39, 40, 40, 96, 984, 122_904),
    ]
    codes = [search._encode_length(n) for n in range(100_000)]
    assert codes == sorted(codes) and max(codes) < 256


def test_many_processes_build_the_same_index(tmp_path, monkeypatch):
    texts, asins = [f"thing {i % 7} of {i % 11} colours" for i in range(400)], [f"B{i:09}" for i in range(400)]
    for name, parallel in (("one", 1 << 30), ("many", 10)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(search, "PARALLEL", parallel)
        search.build_index(tmp_path / name, texts, asins)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "many" / file.name).read_bytes()


# Recordings of the original.


@pytest.mark.parametrize("goals", ["synthetic", "human"])
def test_pages_goals_and_rewards_equal_those_of_the_original(official, goals):
    recorded = json.loads((GOLDEN / f"webshop_{goals}.json").read_text())
    files = [official / name for name in FILES]
    products = load_catalogue(files[0], files[1], files[2] if goals == "human" else None)
    all_goals, prices = Goals(products, seed=7), draw_prices(products, 7)
    assert len(all_goals) == recorded["count"]
    for place, (asin, text, attributes, bound, options) in recorded["goals"].items():
        assert all_goals[int(place)] == (asin, text, attributes, bound, options)

    def score_purchase(*arguments):
        return score(*arguments, load_noun_tagger("words"))

    bought = 0
    for episode in recorded["episodes"]:
        shop = Shop(products, all_goals[episode["goal"]], prices, score_purchase)
        for action, page, clickable, reward in episode["steps"]:
            if action is not None:
                shop.execute(action)
            assert (shop.page.text, shop.page.clickable) == (page, clickable)
            assert (shop.score or 0) == pytest.approx(reward, abs=1e-12)
            bought += shop.score is not None
    assert bought >= 4


def test_token_set_ratio_equals_thefuzz():
    """Expected values are from thefuzz 0.19 without python-Levenshtein."""
    assert token_set_ratio("machine washable", "machine wash") == 86
    assert token_set_ratio("Super-Soft!", "super soft") == token_set_ratio("rug, non slip", "non slip") == 100
    assert token_set_ratio("", "x") == token_set_ratio("é", "é") == 0  # characters outside ASCII are dropped first
    assert token_set_ratio("blue", "('color', 'light blue')") == 100
    assert token_set_ratio("red", "read") == 86


@pytest.mark.parametrize(
    ("bought", "factor"),
    [
        ({"title": "red cotton shirt"}, 1.0),
        ({"title": "cotton thing", "query": "other", "product_category": "A \u203a B"}, 1.0),  # two shared levels
        ({"title": "cotton thing", "query": "other", "product_category": "A"}, 1.0),  # a third of the nouns
        ({"title": "desk lamp"}, 0.0),
    ],
)
def test_the_kind_of_product_changes_the_score(bought, factor):
    wanted = product(title="red cotton shirt", query="shirt", product_category="A \u203a B \u203a C")
    goal = goals.Goal("x", "", ["soft"], 10.0, {})
    found = product(**{"query": "shirt", "product_category": "C", "attributes": ["soft"], **bought})
    assert score(found, 5.0, [], goal, wanted, load_noun_tagger("words")) == factor
    assert score(found, 50.0, [], goal, wanted, load_noun_tagger("words")) == factor / 2  # too expensive


def product(**fields):
    plain = {
        "asin": "x",
        "description": "",
        "bullets": [],
        "price": "$5.0",
        "prices": [5.0],
        "options": {},
        "category": "c",
    }
    return Product(**plain | {"attributes": [], "asked": [], "query": "", "product_category": ""} | fields)


def test_titles_with_few_shared_nouns_lower_the_score():
    words = " ".join(f"w{chr(97 + i)}" for i in range(20))
    wanted = product(title=words, query="q", product_category="A \u203a B")
    goal = goals.Goal("x", "", ["soft"], 10.0, {})
    for title, query, factor in [
        ("wa", "q", 0.1),
        ("wa wb wc", "other", 0.5),
        ("wa wb wc", "q", 1.0),
        ("wa wb wc wd we", "o", 1.0),
    ]:
        found = product(title=title, query=query, attributes=["soft"])
        assert score(found, 5.0, [], goal, wanted, load_noun_tagger("words")) == factor


# Splits.


@pytest.mark.slow
def test_splits_are_disjoint_on_every_worker():
    make = {"_target_": "aem_exp.envs.webshop.Generated", "products": 100, "panels": {"test": 64, "dev": 64}}
    world = instantiate(make)
    ids = {split: [task.id for task in world.tasks(split)] for split in world.splits}
    places = {split: {one.partition("-")[2] for one in found} for split, found in ids.items()}
    assert {len(places[split]) for split in ("test", "dev")} == {64}
    assert not any(places[a] & places[b] for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")))
    workers = WorkerPool(make, 3, 30.0)
    for split in world.splits:
        tasks = world.tasks(split)[:6]
        replies = workers.reset(dict(enumerate(tasks)))
        assert [replies[i].goal for i in range(6)] == [task.payload["text"] for task in tasks]
    workers.close()


@pytest.mark.slow
def test_verl_agents_split_validates_on_training_goals_and_a_note_warns():
    folder = generated.generate_catalogue(300, 0)
    world = WebShop(str(folder), nouns="words", split="verl_agent")
    train, dev, test = (world.tasks(split) for split in world.splits)
    total = len(world._goals(0, 0))
    assert (len(train), len(dev), len(test)) == (16 * (total - 500), 128, 128)
    assert len({task.id for split in (dev, test) for task in split}) == 256
    assert train[0].payload["text"] == world._goals(0, 0)[500].text
    assert train[total - 500].payload["text"] == world._goals(1, 1)[500].text
    trained = {(asin, str(options)) for w in range(4) for asin, _, _, _, options in world._goals(w, w)[500:]}
    again = [(task.payload["asin"], str(task.payload["options"])) in trained for task in dev]
    assert sum(again) > 100  # most validation goals are training goals, so this split is not the default
    assert any("env.make.split=verl_agent" in note for note in notes(load(["+experiment=webshop_1_5b_verl_agent"])))
    assert any(
        "env.make.nouns=words" in note for note in notes(load(["+experiment=webshop_1_5b", "env.make.nouns=words"]))
    )
    seeded = WebShop(str(folder), nouns="words", split="verl_agent", seed=3)
    assert seeded.tasks("train")[0].payload["text"] == world._goals(3, 3)[500].text
    original = WebShop(str(folder), nouns="words")
    assert [len(original.tasks(split)) for split in ("test", "dev")] == [500, 1000]
    assert original.tasks("train")[0].id == "train-1500"


# Experts, and the generated shop.


def test_the_oracle_wins_and_the_expert_usually_wins():
    world = Generated(products=200)
    scores = {}
    for name, respond in (("oracle", world.oracle), ("expert", lambda env: world.expert(env, Random(0)))):
        env, scores[name] = world.env(), []
        for task in world.tasks("test")[:40]:
            turn = env.reset(task)
            for _ in range(15):
                turn = env.step(respond(env))
                assert turn.valid and turn.metrics["admissible"]
                if turn.done:
                    break
            scores[name].append(turn.metrics["score"])
            assert turn.metrics["won"] == (turn.metrics["score"] == 1)
    assert scores["oracle"] == [1.0] * 40
    assert sum(scores["expert"]) / 40 > 0.8


def test_the_reward_is_paid_for_success_or_in_proportion_to_the_score():
    for pays, reward, paid in (("success", 10.0, 0.0), ("score", 1.0, None)):
        world = Generated(products=100, pays=pays, reward=reward, tags=False, panels={"test": 8, "dev": 8})
        env = world.env()
        task = next(task for task in world.tasks("train") if task.payload["options"])
        env.reset(task)
        for action in (f"search[{task.payload['text']}]", "click[next >]"):
            assert env.step(action).reward == 0
        env.step(next(action for action in env.actions if action.startswith("click[b0")))
        turn = env.step("click[buy now]")  # without the options of the goal
        assert turn.done and 0 <= turn.metrics["score"] < 1
        assert turn.reward == (turn.metrics["score"] if paid is None else paid)
        assert env.step("click[buy now]").reward == 0


def test_spaces_of_a_word_level_tokenizer_are_removed():
    world = Generated(products=100, tags=False, panels={"test": 8, "dev": 8})
    env = world.env()
    env.reset(world.tasks("dev")[0])
    assert env.parse("search [ red  shoes ]") == "search[red shoes]"
    assert env.step("search [ running shoes ]").metrics["admissible"] == 1
    assert not env.step("buy it").valid
    assert "Instruction" not in env.step("click[next >]").observation  # prompts contain the goal anyway


# Malformed data.


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("missing", r"items_shuffle_1000\.json, items_ins_v2_1000\.json.* pip install gdown .* gdown 1Eg"),
        ("cut off", r"items_shuffle_1000\.json cannot be read "),
        ("a page", r"items_ins_v2_1000\.json cannot be read .* \{"),
        ("empty", r"no product"),
        ("no field", r"items_shuffle_1000\.json: product 3 .*KeyError: 'full_description'"),
        ("odd field", r"product 3 .*KeyError"),
        ("many goals", r"product 3 .*100,000 goals"),
        ("odd instruction", r"product 3 .*TypeError: .* 7"),
        ("odd attribute", r"product 3 .*TypeError: .* 7"),
        ("surrogate", r"product 3 .*UnicodeEncodeError"),
        ("lower case", r"product 3 .*ValueError: asin 'b0\w+'"),
        ("deep", r"items_shuffle_1000\.json cannot be read "),
        ("odd key", r"items_ins_v2_1000\.json cannot be read "),
        ("few", r"has \d+ goals"),
    ],
)
def test_malformed_data_is_refused_in_one_line(defect, message, official, tmp_path, monkeypatch):
    data = tmp_path / "webshop"
    if defect == "missing":
        monkeypatch.setenv("WEBSHOP_DATA", str(data))
    else:
        shutil.copytree(official, data)
        items, entries = (json.loads((data / name).read_text()) for name in FILES[:2])
        if defect == "cut off":
            (data / FILES[0]).write_text(json.dumps(items)[:-200])
        if defect == "a page":
            (data / FILES[1]).write_text("<!DOCTYPE html><title>Google Drive</title>")
        if defect == "empty":
            (data / FILES[0]).write_text("[]")
        if defect == "no field":
            del items[3]["full_description"]
        if defect == "odd field":
            items[3]["customization_options"] = {"color": [{"colour": "red"}]}
        entry = entries[items[3]["asin"]]
        if defect == "many goals":
            ten = [{"value": str(value)} for value in range(10)]
            items[3]["customization_options"] = {f"option {name}": ten for name in range(9)}
        if defect == "odd instruction":
            entry["instruction"] = 7
        if defect == "odd attribute":
            entry["instruction_attributes"] = [7]
        if defect == "surrogate":
            items[3]["asin"] = "B0\ud800"
        if defect == "lower case":
            items[3]["asin"] = items[3]["asin"].lower()
        if defect not in ("cut off", "a page", "empty"):
            (data / FILES[0]).write_text(json.dumps(items))
            (data / FILES[1]).write_text(json.dumps(entries))
        if defect == "deep":
            (data / FILES[0]).write_text("[" * 100_000)
        if defect == "odd key":
            (data / FILES[1]).write_text("{[1]: 2}")
    with pytest.raises(ConfigError, match=message) as caught:
        WebShop(None if defect == "missing" else str(data), nouns="words").tasks("train")
    assert caught.value.field == ("WEBSHOP_DATA" if defect == "missing" else "env.make.data")
    assert "\n" not in str(caught.value)


def test_a_missing_tagger_is_an_error_with_both_remedies(official):
    if find_spec("en_core_web_sm"):
        pytest.skip("the model is installed")
    with pytest.raises(ConfigError, match=r"python -m spacy download en_core_web_sm;.* env.make.nouns=words"):
        WebShop(str(official))


def test_a_catalogue_is_built_once(official, monkeypatch):
    load_catalogue(official / FILES[0], official / FILES[1], None)
    monkeypatch.setattr(catalogue, "_build", lambda *_: pytest.fail("built again"))
    load_catalogue(official / FILES[0], official / FILES[1], None)


def test_a_too_long_element_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "LARGEST", 1000)
    (tmp_path / "x.json").write_text('["' + "x" * (3 << 20))
    with pytest.raises(ConfigError, match="1,000 characters"):
        list(catalogue._read_elements(tmp_path / "x.json", list))


@pytest.mark.slow
def test_indexing_fails_if_a_process_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "PARALLEL", 10)
    monkeypatch.setattr(search, "CHUNK", 10)
    words = "some words of a product"
    search.build_index(tmp_path, [words] * 300, [str(n) for n in range(300)])
    assert len(search.Index(tmp_path).search("product", 50)) == 50

    def texts():
        for number in range(100_000):
            if number == 1000:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            yield words

    with pytest.raises(OSError, match="killed"):
        search.build_index(tmp_path, texts(), [""] * 100_000)


def test_a_killed_build_leaves_no_folder_and_a_finished_folder_may_be_read_only(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "thing"
    code = "import os, signal; from pathlib import Path; from aem_exp.core import disk\n"
    code += f"with disk.create_folder_once(Path({str(folder)!r})) as empty:\n"
    code += "    (empty / 'half').write_text('x'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert not folder.exists() and (tmp_path / "cache" / "thing.part" / "half").exists()
    with disk.create_folder_once(folder) as empty:
        assert not list(empty.iterdir())
        (empty / "whole").write_text("x")
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["thing"]
    monkeypatch.setattr(disk, "check_writable", lambda *_: pytest.fail("it may be read-only"))
    with disk.create_folder_once(folder) as empty:
        assert empty is None


def test_json_can_be_read_in_small_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "PIECE", 7)
    for kind, value in (
        (list, [1.5, "a,]", {"x": [2, None]}, -12345678901]),
        (dict, {"k": 1, "long key": [1, 2], "z": "}"}),
    ):
        (tmp_path / "x.json").write_text(json.dumps(value, indent=1))
        found = list(catalogue._read_elements(tmp_path / "x.json", kind))
        assert found == (list(value.items()) if kind is dict else [("", one) for one in value])


def test_the_reference_prompt_fits_its_budget():
    """A page of ten products and two past pages fit, at 3 characters per token. (Longer pages drop history, as in verl-agent.)"""
    rules = load(["+experiment=webshop_1_5b"]).env
    page = " [SEP] ".join(
        ["'Back to Search'", *(f"'B0ABCDEFGH' [SEP] '{'word ' * 25}' [SEP] '$10.0'" for _ in range(10))]
    )
    pair = rules.prompt["pair"].format(n=1, observation=page, action="click[b0abcdefgh]")
    words = {
        "task": "find me " + "x " * 40,
        "observation": page,
        "actions": "'click[b0abcdefgh]', " * 13,
        "step": 5,
        "turn": 6,
    }
    text = rules.prompt["window"].format(**words, history=f"{pair}\n{pair}", length=2)
    assert len(text) / 3 < rules.context_tokens - rules.response_tokens
