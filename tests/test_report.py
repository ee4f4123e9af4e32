"""The page about prepared data, read with html.parser; its numbers are counted again here, in plain Python."""

import io
import random
import re
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import ROOT, instruction_texts
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

import lit_sft.figures
import lit_sft.report
from lit_sft.errors import InputError
from lit_sft.figures import MIN_PREFIX, measure, measure_sharing, padded_tokens, repeats, shuffled
from lit_sft.report import percent, show_examples, write_data_report
from lit_sft.spelling import HEAD, PART, TAIL, spell, visible
from lit_sft.tokenizer import Tokenizer

Pair = tuple[list[int], list[bool]]
EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, tokenizer_model) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.model").write_bytes(tokenizer_model)
    return Tokenizer(directory)


def write_shards(
    folder: Path, split: str, examples: list[Pair], per_shard: int = 1000, origins: list[tuple[int, int]] | None = None
) -> None:
    """The contract of what lies on disk, written without the toolkit; ``origins``: source and row of each."""
    folder.mkdir(parents=True, exist_ok=True)
    origins = origins or [(0, 1000 + i) for i in range(len(examples))]
    for number, start in enumerate(range(0, len(examples), per_shard)):
        here = examples[start : start + per_shard]
        sources, rows = zip(*origins[start : start + per_shard], strict=True)
        ends = [sum(len(ids) for ids, _ in here[:k]) for k in range(len(here) + 1)]
        tensors = {
            "input_ids": torch.tensor([i for ids, _ in here for i in ids], dtype=torch.int32),
            "labels_mask": torch.tensor([m for _, mask in here for m in mask], dtype=torch.bool),
            "offsets": torch.tensor(ends, dtype=torch.int64),
            "n_prompt": torch.tensor([n_prompt(pair) for pair in here], dtype=torch.int32),
            "n_labels": torch.tensor([sum(mask) for _, mask in here], dtype=torch.int32),
            "source": torch.tensor(sources, dtype=torch.int16),
            "row": torch.tensor(rows, dtype=torch.int32),
        }
        torch.save(tensors, folder / f"{split}-{number:05d}.pt")


def n_prompt(pair: Pair) -> int:
    """These tests' prompts end at the first label."""
    return pair[1].index(True) if any(pair[1]) else len(pair[0])


def example(prompt: list[int], response: list[int]) -> Pair:
    return [1, *prompt, *response], [False] * (1 + len(prompt)) + [True] * len(response)


def draw_examples(n: int, seed: int = 0, longest: int = 90) -> list[Pair]:
    """Three preambles, prompts of few kinds so that some occur twice, responses with an end token or cut off."""
    draw = random.Random(seed)
    preambles = [list(range(100, 100 + k)) for k in (0, 20, 25)]
    made = []
    for _ in range(n):
        prompt = draw.choice(preambles) + [draw.randint(5, 12) for _ in range(draw.randint(0, 2))]
        response = [draw.randint(5, 9) for _ in range(draw.choice([0, 0, 1, 2, draw.randint(3, longest)]))]
        made.append(example(prompt, [*response, EOS if draw.random() < 0.9 else 7]))
    return made


class Page(HTMLParser):
    """Every table as rows of texts by its id, the shown examples token by token, and all that a browser might obey."""

    VOID = ("meta", "line", "rect", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.examples: list[dict] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.open: list[str] = []
        self.texts: dict[str, str] = {}
        self._cell = self._token = self._id = None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attrs]
        assert len(dict(attrs)) == len(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        own = dict(attrs)
        if "id" in own:
            assert own["id"] not in self.texts
            self._id = own["id"]
            self.texts[self._id] = ""
        if tag == "table":
            self.tables[own["id"]] = []
        elif tag == "tr":
            self.tables[list(self.tables)[-1]].append([])
        elif tag in ("td", "th"):
            self._cell = ""
        elif tag == "summary":
            self.examples.append({"tokens": [], "hidden": ""})
        elif "title" in own and tag != "i":  # a mark in a chart
            self._token = [int(own["title"]), "", tag == "mark", own.get("class") == "c"]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        assert self.open.pop() == tag, tag
        if tag in ("td", "th"):
            self.tables[list(self.tables)[-1]][-1].append(self._cell)
            self._cell = None
        elif tag in ("span", "mark") and self._token:
            self.examples[-1]["tokens"].append(tuple(self._token))
            self._token = None
        elif tag in ("table", "p"):
            self._id = None

    def handle_data(self, data: str) -> None:
        if self._id:
            self.texts[self._id] += data
        if self._cell is not None:
            self._cell += data
        elif self._token:
            self._token[1] += data
        elif self.open and self.open[-1] == "em":
            self.examples[-1]["hidden"] += data
        elif (self.open and self.open[-1] == "summary") or self.open[-2:] == ["summary", "b"]:
            self.examples[-1]["title"] = self.examples[-1].get("title", "") + data

    def shown(self) -> list[dict]:
        return [e for e in self.examples if e["tokens"]]


def place(split: str, i: int) -> str:
    return f"{split} {i}, mine.json row {1000 + i:,}"


def number(text: str) -> int:
    return int(text.replace(",", ""))


def report(folder: Path, tokenizer: Tokenizer, facts: dict | None = None) -> Page:
    assert write_data_report(folder, "mine", facts or {}, tokenizer) == "report.html"
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data() -> dict[str, list[Pair]]:
    train = draw_examples(150)
    return {"train": train, "val": [*draw_examples(20, seed=1), train[3], train[3]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("data") / "mine"
    for split, examples in data.items():
        write_shards(folder, split, examples, per_shard=64)
    return folder


FACTS = {
    "stop_ids": [EOS],
    "max_seq_length": 100,
    "prompt_style": "alpaca",
    "checkpoint_dir": "checkpoints/a/b",
    "n_rows": 1413,
    "n_skipped": 1234,
    "n_cut": 7,
    "n_dropped": 0,
    "n_duplicates": 0,
    "n_train": 150,
    "length": {"p50": 40, "p95": 90, "p99": 99, "max": 4321},
    "sources": [{"name": "mine.json", "n_rows": 1413}],
}


@pytest.fixture(scope="module")
def page(folder, tokenizer) -> Page:
    return report(folder, tokenizer, FACTS)


def test_counts(page, data):
    head, *rows = page.tables["counts"]
    assert head == ["split", "examples", "tokens", "labels", "labels’ share", "p50", "p95", "p99", "longest"]
    for (split, examples), row in zip(data.items(), rows, strict=True):
        lengths = sorted(len(ids) for ids, _ in examples)
        n_labels = sum(sum(mask) for _, mask in examples)
        # at least p % of the examples are not longer, and fewer are not as long as the next shorter
        for p, cell in zip((50, 95, 99), row[5:8], strict=True):
            assert sum(n <= number(cell) for n in lengths) >= len(lengths) * p / 100
            assert sum(n < number(cell) for n in lengths) < len(lengths) * p / 100
        assert [row[0], *map(number, row[1:4])] == [split, len(examples), sum(lengths), n_labels]
        assert (row[4], number(row[8])) == (f"{100 * n_labels / sum(lengths):.1f} %", lengths[-1])
    assert page.tables["preparation"] == [
        ["what", "count"],
        ["rows read", "1,413"],
        ["malformed, left out", "1,234"],
        ["too long for the limit, left out", "0"],
        ["too long for the limit, response cut", "7"],
        ["train examples", "150"],
    ]


def test_unended(folder, data):
    for split, examples in data.items():
        expected = sum(ids[-1] != EOS for ids, _ in examples)
        assert measure(folder, split, [EOS]).n_unended == expected > 0
        assert measure(folder, split).n_unended == 0  # where no end token is known, none is missed


def test_duplicates_and_leakage(page, data):
    def prompt(pair: Pair) -> tuple[int, ...]:
        return tuple(pair[0][: n_prompt(pair)] if n_prompt(pair) > 1 else pair[0])  # BOS alone asks nothing

    wholes = {split: [tuple(ids) for ids, _ in examples] for split, examples in data.items()}
    prompts = {split: [prompt(pair) for pair in examples] for split, examples in data.items()}
    for row in page.tables["duplicates"][1:]:
        of = wholes[row[0]]
        [(most, times)] = Counter(of).most_common(1)
        assert list(map(number, row[1:3])) == [len(x) - len(set(x)) for x in (of, prompts[row[0]])]
        assert row[3] == f"{times} times: {place(row[0], of.index(most))}"
    leaked = sum(ids in set(wholes["train"]) for ids in wholes["val"])
    asked = [i for i, p in enumerate(prompts["val"]) if p in set(prompts["train"])]
    said = " ".join(page.texts["leakage"].split())
    assert said == (
        f"{leaked} of {len(data['val'])} val examples are in train as a whole, {len(asked)} by their prompts."
    )
    pairs = [[place("val", i), place("train", prompts["train"].index(prompts["val"][i]))] for i in asked[:5]]
    assert page.tables["leaked"][1:] == pairs
    assert leaked >= 2 and len(asked) > leaked


@pytest.mark.parametrize("outlier", [0, 2000])
def test_histogram(tmp_path, tokenizer, data, outlier):
    train = data["train"] + ([example([5], [6] * outlier)] if outlier else [])
    write_shards(tmp_path, "train", train)
    write_shards(tmp_path, "val", data["val"])
    page = report(tmp_path, tokenizer)
    _, *rows = page.tables["histogram"]
    lengths = {"train": [len(ids) for ids, _ in train], "val": [len(ids) for ids, _ in data["val"]]}
    assert len(rows) <= 40
    for row in rows:
        bounds = list(map(number, re.findall(r"[\d,]+", row[0])))
        low, high = bounds if len(bounds) == 2 else (*bounds, 10**9)
        assert [number(cell) for cell in row[1:]] == [sum(low <= n <= high for n in of) for of in lengths.values()]
    assert rows[-1][0].endswith(" and more") == (outlier > 0)
    assert all(sum(number(row[k]) for row in rows) == len(of) for k, of in ((1, lengths["train"]), (2, lengths["val"])))
    drawn = [a for a in page.attributes if a[:2] == ("rect", "class")]
    assert len(drawn) == sum(cell != "0" for row in rows for cell in row[1:])


def test_the_cut_is_marked_where_it_is(tmp_path, tokenizer):
    write_shards(tmp_path, "train", [example([5], [6] * (n - 2)) for n in range(3, 101)])
    bars = len(report(tmp_path, tokenizer, {"max_seq_length": 100}).tables["histogram"]) - 1
    text = (tmp_path / "report.html").read_text()
    assert ">cut at 100<" in text and f'<line x1="{bars:.1f}" x2="{bars:.1f}" y1="0" y2="100"/>' in text
    page = report(tmp_path, tokenizer, {"max_seq_length": 4096})
    text = (tmp_path / "report.html").read_text()
    assert "line" not in page.tags and "The cut, at 4,096 tokens, is beyond the right edge" in text


def test_longest_and_shortest(page, data):
    everything = [(place(split, i), pair) for split, of in data.items() for i, pair in enumerate(of)]
    places = dict(everything)
    lengths = sorted(len(ids) for _, (ids, _) in everything)
    for name, expected in (("longest", lengths[::-1][:5]), ("shortest", lengths[:5])):
        _, *rows = page.tables[name]
        assert [number(row[1]) for row in rows] == expected and len({row[0] for row in rows}) == 5
        for where, n_tokens, n_labels, _ in rows:
            ids, mask = places[where]
            assert (number(n_tokens), number(n_labels)) == (len(ids), sum(mask))


def saved_by_sharing(step: list[list[int]], least: int) -> int:
    """Tokens that are not distinct prefixes, among the examples that have their first ``least`` tokens in common."""
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for ids in step:
        if len(ids) >= least:
            groups.setdefault(tuple(ids[:least]), []).append(ids)
    return sum(
        sum(map(len, group)) - len({tuple(ids[:k]) for ids in group for k in range(1, len(ids) + 1)})
        for group in groups.values()
    )


@pytest.mark.parametrize("n", [1, 2, 64, 150])
def test_tokens_saved_by_prefixes(tmp_path, data, n):
    write_shards(tmp_path, "train", data["train"][:n], per_shard=40)
    order = [data["train"][i][0] for i in shuffled(n)]
    expected = sum(saved_by_sharing(order[k : k + 64], MIN_PREFIX) for k in range(0, n, 64))
    found = measure_sharing(measure(tmp_path, "train"))
    assert (found.n_sampled, found.n_tokens) == (n, sum(map(len, order)))
    assert found.n_saved == expected and (expected > 0) == (n > 2)


@given(st.lists(st.lists(st.integers(1, 2), min_size=2, max_size=6), min_size=1, max_size=12))
def test_tokens_saved_by_any_prefixes(tmp_path_factory, examples):
    folder = tmp_path_factory.mktemp("any")
    write_shards(folder, "train", [(ids, [False] + [True] * (len(ids) - 1)) for ids in examples])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lit_sft.figures, "MIN_PREFIX", 2)
        patch.setattr(lit_sft.figures, "MIN_SHARE", 0.0)
        found = measure_sharing(measure(folder, "train"))
    assert found.n_saved == saved_by_sharing(examples, 2)
    assert len(found.prefixes) <= 5 and bool(found.prefixes) == (found.n_saved > 0)
    having = {}
    for prefix in found.prefixes:
        begin = [ids for ids in examples if ids[: len(prefix.ids)] == prefix.ids]
        assert len(begin) == prefix.n_examples >= 2
        # as long as they agree: one ends here, or two go on in different ways
        assert len({tuple(ids[: len(prefix.ids) + 1]) for ids in begin}) > 1 or begin[0] == prefix.ids
        having[tuple(prefix.ids)] = prefix.n_examples
    if 0 < len(having) < 5:  # all there are: together they save all that is saved
        above = {p: max((len(q) for q in having if q != p and p[: len(q)] == q), default=0) for p in having}
        assert sum((len(p) - above[p]) * (n - 1) for p, n in having.items()) == found.n_saved


def test_prefixes_in_the_page(page, folder, data, tokenizer):
    found = measure_sharing(measure(folder, "train"))
    said = " ".join(page.texts["sharing"].split())
    share = 100 * found.n_saved / found.n_tokens
    assert f"{found.n_saved:,} tokens ({share:.1f} %) would not be computed again" in said
    assert "In train (150 examples" in said and "8 tokens or more were computed once per step of 64 examples" in said
    _, *rows = page.tables["prefixes"]
    assert [list(map(number, row[:2])) for row in rows] == [[len(p.ids), p.n_examples] for p in found.prefixes]
    assert rows[0][2] == "".join(spell(found.prefixes[0].ids, tokenizer))


def test_prefixes_of_many_examples_are_looked_for_in_a_sample(tmp_path, tokenizer, data, monkeypatch):
    monkeypatch.setattr(lit_sft.figures, "SAMPLE", 64)
    monkeypatch.setattr(lit_sft.figures, "PREFIX_TOKENS", 22)
    write_shards(tmp_path, "train", data["train"], per_shard=7)
    found = measure_sharing(measure(tmp_path, "train"))
    chosen = [data["train"][i][0] for i in shuffled(150)[:64]]
    assert (found.n_sampled, found.n_tokens) == (64, sum(map(len, chosen)))
    assert found.n_saved == saved_by_sharing([ids[:22] for ids in chosen], MIN_PREFIX) > 0
    assert max(len(prefix.ids) for prefix in found.prefixes) == 22
    said = " ".join(report(tmp_path, tokenizer).texts["sharing"].split())
    assert said.startswith("In a fixed random sample of train (64 examples")
    assert said.endswith("Prefixes are followed for 22 tokens.")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.sampled_from([1, 4, 8]))
def test_padded_tokens(lengths, size):
    groups = [lengths[k : k + size] for k in range(0, len(lengths), size)]
    assert padded_tokens(torch.tensor(lengths).numpy(), size) == sum(max(g) * len(g) for g in groups)


def test_padding_in_the_page(page, data):
    lengths = [len(data["train"][i][0]) for i in shuffled(150)]
    _, *rows = page.tables["padding"]
    for size, row in zip((4, 8), rows, strict=False):
        computed = sum(max(lengths[k : k + size]) * len(lengths[k : k + size]) for k in range(0, 150, size))
        assert row[0] == f"{size} examples, padded to the longest"
        assert list(map(number, row[1:3])) == [sum(lengths), computed]
        assert row[3] == f"{100 * (1 - sum(lengths) / computed):.1f} %"
    assert rows[2] == ["packed, as trained here", f"{sum(lengths):,}", f"{sum(lengths):,}", "0 %"]
    steps = [sum(lengths[k : k + 64]) for k in (0, 64, 128)]
    assert max(steps) <= 4096  # one row each: multiples of 64, the larger ones of 128
    rounded = sum(n + -n % (64 if n <= 2048 else 128) for n in steps)
    assert list(map(number, rows[3][1:3])) == [sum(lengths), rounded] and len(rows) == 4


def test_shown_examples_are_those_on_disk(page, data, tokenizer):
    everything = [(split, i) for split in data for i in range(len(data[split]))]
    lengths = [len(data[split][i][0]) for split, i in everything]
    assert len(page.shown()) == 20
    places = []
    for shown in page.shown():
        where, n_tokens, n_labels = re.match(r"(.*): (\d+) tokens?, (\d+) labelled", shown["title"]).groups()
        split, i = where.partition(",")[0].split()
        assert where == place(split, int(i))
        ids, mask = data[split][int(i)]
        places.append((split, int(i)))
        assert (int(n_tokens), int(n_labels)) == (len(ids), sum(mask))
        assert [token[0] for token in shown["tokens"]] == ids
        assert [token[2] for token in shown["tokens"]] == mask
        assert [token[3] for token in shown["tokens"]] == [k < 3 and k > 0 for k in ids]  # <s> and </s>
        assert [token[1] for token in shown["tokens"]] == spell(ids, tokenizer)
    assert len(set(places)) == 20
    assert lengths[everything.index(places[1])] == max(lengths) and lengths[everything.index(places[2])] == min(lengths)


def test_a_long_example_loses_its_middle_and_says_so(tmp_path, tokenizer):
    ids, mask = example(list(range(10, 60)) * 40, [70, *range(71, 100), EOS])
    write_shards(tmp_path, "train", [(ids, mask), example([5] * (HEAD + TAIL - 2), [EOS])])
    long, whole = sorted(report(tmp_path, tokenizer).shown(), key=lambda e: -len(e["hidden"]))
    assert [t[0] for t in long["tokens"]] == ids[:HEAD] + ids[-TAIL:]
    assert [t[2] for t in long["tokens"]] == mask[:HEAD] + mask[-TAIL:]
    assert long["hidden"] == f"… {len(ids) - HEAD - TAIL:,} tokens more …"
    assert f"{len(ids):,} tokens" in long["title"] and "31 labelled" in long["title"]
    assert (len(whole["tokens"]), whole["hidden"]) == (HEAD + TAIL, "")


HOSTILE = (
    "</p></mark></script><script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(1)> &amp;&lt; \"'"
    "<style>*{display:none}</style> \u202eabc\u202c \u200b\u200d\ufeff\u2028\u2029 \x1b[31mred\x1b[0m \x07\x00 "
    "{{ facts }} {% raw %} <!-- ]]> \ud7ff עברית العربية 日本語 👩‍👩‍👧 <s></s>"
)


def test_hostile_text_stays_text(tmp_path, tokenizer):
    def fill(folder: Path, text: str, ids: list[int]) -> Page:
        write_shards(folder, "train", [example(ids, [*ids, EOS]), example([5], [EOS])])
        return report(folder, tokenizer, {"prompt_style": text, "checkpoint_dir": text, "max_seq_length": 9000})

    ids = tokenizer.encode(HOSTILE, bos=False)
    tame, hostile = fill(tmp_path / "a", "tame", [50] * len(ids)), fill(tmp_path / "b", HOSTILE, ids)
    assert hostile.tags == tame.tags  # the same elements, as many of each
    assert [a[:2] for a in hostile.attributes] == [a[:2] for a in tame.attributes]
    [shown] = [e for e in hostile.shown() if len(e["tokens"]) > 5]
    text = "".join(token[1] for token in shown["tokens"] if token[1] != PART)
    dummy = spell(tokenizer.encode(HOSTILE, bos=False), tokenizer)[0][:1]
    assert text == "<s>" + 2 * (dummy + visible(HOSTILE)).replace("⁇", " ⁇ ") + "</s>"
    raw = (tmp_path / "b" / "report.html").read_text(encoding="utf-8").replace(HOSTILE, "")
    seen = {c for c in raw if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Co", "Cn")} - {"\n"}
    # what is left are the facts, which are the user's own arguments: harmless to a browser, as the tags show
    assert seen <= set(HOSTILE)
    body = raw[raw.index("token by token") :]
    assert not {c for c in body if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} - {"\n"}


def test_nothing_outside_the_page_is_asked_for(page, folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "a", "form"} & set(page.tags)
    names = {name for _, name, _ in page.attributes}
    assert not {"src", "href", "srcset", "xlink:href", "action", "background"} & names
    assert not [name for name in names if name.startswith("on")]
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    policy = [value for _, name, value in page.attributes if name == "content" and value and "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_tables_and_the_chart_can_be_read_without_eyes(page):
    assert page.tags["caption"] == page.tags["table"] == len(page.tables) and page.tags["h1"] == 1
    assert ("html", "lang", "en") in page.attributes and ("svg", "role", "img") in page.attributes
    heads = sum(len(rows[0]) for rows in page.tables.values())
    assert page.attributes.count(("th", "scope", "col")) == heads
    regions = [a for a in page.attributes if a[:2] == ("div", "tabindex")]
    assert len(regions) == page.tags["table"]  # what scrolls can be scrolled by keyboard


def luminance(colour: str) -> float:
    full = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(full[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_contrast(folder, page):
    """WCAG 2.2: 4.5 for text, 3 for what a chart is made of; light and dark."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+);", part)) for part in text.split("prefers-color-scheme: dark")[:2]
    )
    assert light.keys() == dark.keys() and light["page"] != dark["page"]
    pairs = [("text", back, 4.5) for back in ("page", "soft", "note")]
    pairs += [("muted", "page", 4.5), ("muted", "soft", 4.5), ("cut", "page", 4.5), ("learned-text", "learned", 4.5)]
    pairs += [("control", "soft", 4.5), ("control", "learned", 4.5), ("train", "page", 3), ("val", "page", 3)]
    pairs += [("learned-line", "page", 3)]
    for colours in (light, dark):
        for front, back, least in pairs:
            high, low = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= least, (front, back)


def test_the_same_data_give_the_same_bytes(tmp_path, tokenizer, data, monkeypatch):
    facts = {"stop_ids": [EOS], "max_seq_length": 100}
    pages = []
    for per_shard, chunk in ((1000, 1 << 22), (7, 1 << 22), (64, 1), (64, 50)):
        monkeypatch.setattr(lit_sft.figures, "CHUNK_TOKENS", chunk)
        folder = tmp_path / f"{per_shard}-{chunk}"
        for split, examples in data.items():
            write_shards(folder, split, examples, per_shard)
        report(folder, tokenizer, facts)
        pages.append((folder / "report.html").read_bytes())
    assert len(set(pages)) == 1


def test_one_example_without_val_or_facts(tmp_path, tokenizer):
    write_shards(tmp_path, "train", [example([5], [6, EOS])])
    page = report(tmp_path, tokenizer)
    assert page.tables["counts"][1:] == [["train", "1", "4", "2", "50.0 %", *["4"] * 4]]
    assert page.tables["duplicates"][1:] == [["train", "0", "0", "–"]]
    assert "preparation" not in page.tables and "prefixes" not in page.tables and "leakage" not in page.texts
    assert [len(e["tokens"]) for e in page.shown()] == [4]
    assert "There is no val split" in (tmp_path / "report.html").read_text()
    assert page.tables["padding"][1][3] == "0 %"


def test_plain_text_has_no_prompt_to_repeat(tmp_path, tokenizer):
    write_shards(tmp_path, "train", [([1, k, EOS], [False, True, True]) for k in (5, 6, 6)])
    write_shards(tmp_path, "val", [([1, 7, EOS], [False, True, True])])
    page = report(tmp_path, tokenizer, {"sources": FACTS["sources"]})
    twice = f"2 times: {place('train', 1)}"
    assert page.tables["duplicates"][1:] == [["train", "1", "1", twice], ["val", "0", "0", "–"]]
    assert " ".join(page.texts["leakage"].split()).startswith("0 of 1 val example are in train as a whole, 0 by their")
    assert "Prompts are learned too." in (tmp_path / "report.html").read_text()


def test_repeats():
    hashes, origins = torch.tensor([5, 9, 5, 9, 5, 2]).numpy(), torch.tensor([1, 2, 3, 4, 1, 5]).numpy()
    assert repeats(hashes, torch.arange(6).numpy()) == (3, 0, 3)
    assert repeats(hashes, origins) == (2, 0, 2)  # the last 5 is the first again, on purpose
    assert repeats(hashes[3:], origins[3:]) == (0, 0, 1) and repeats(hashes[:0], origins[:0]) == (0, 0, 0)


def test_several_sources_and_rows_repeated_on_purpose(tmp_path, tokenizer):
    examples = [example([k, k], [k, EOS]) for k in (50, 60, 60, 70)]
    origins = [(0, 3), (1, 2**31 - 1), (1, 2**31 - 1), (1, 1)]
    write_shards(tmp_path, "train", examples, origins=origins)
    sources = [
        {"name": "a.json", "n_train": 1, "n_rows": 4},
        {"name": "b", "n_train": 3, "n_rows": 2, "n_not_drawn": 5},
    ]
    facts = {"sources": sources, "n_train": 4, "n_rows": 6, "n_not_drawn": 5, "n_val": 0}
    page = report(tmp_path, tokenizer, facts)
    assert page.tables["preparation"] == [
        ["what", "all", "a.json", "b"],
        ["rows read", "6", "4", "2"],
        ["not drawn", "5", "0", "5"],
        ["train examples", "4", "1", "3"],
        ["val examples", "0", "0", "0"],
    ]
    assert page.tables["duplicates"][1:] == [["train", "0", "0", "–"]]
    assert "1 example is there again on purpose" in (tmp_path / "report.html").read_text()
    titles = {e["title"].partition(":")[0] for e in page.shown()}
    assert {"train 0, a.json row 3", "train 2, b row 2,147,483,647", "train 3, b row 1"} <= titles


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (1, "100 %"), (0.5, "50.0 %"), (1e-9, "<0.1 %"), (0.99999, ">99.9 %")]
)
def test_percent(share, text):
    assert percent(share) == text


# ---- spelling


def train_bpe(tok: tokenizers.Tokenizer, alphabet: list[str]) -> tokenizers.Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(instruction_texts(), trainer)
    return tok


def byte_level() -> str:
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    train_bpe(tok, pre_tokenizers.ByteLevel.alphabet())
    tok.add_special_tokens([AddedToken("<|end|>")])
    return tok.to_str()


def byte_fallback() -> str:
    """As transformers converts Llama's: newlines are byte tokens, which are decoded in runs."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.", *(f"<0x{i:02X}>" for i in range(256)), "▁the", "<unk>", "▁t", "▁th"]
    vocabulary = {piece: i for i, piece in enumerate(letters)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tok = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tok.decoder = decoders.Sequence(steps)
    tok.add_special_tokens([AddedToken("<|end|>")])
    return tok.to_str()


@pytest.fixture(scope="module", params=["sentencepiece", byte_level, byte_fallback])
def any_tokenizer(request, tmp_path_factory, tokenizer) -> Tokenizer:
    if request.param == "sentencepiece":
        return tokenizer
    directory = tmp_path_factory.mktemp("json")
    (directory / "tokenizer.json").write_text(request.param(), encoding="utf-8")
    return Tokenizer(directory)


TEXTS = [
    "hello the world",
    "  two\n\n the\tlines ",
    "naïve café 日本語",
    "👩‍👩‍👧‍👦 the 👍🏽",
    "a\u200bb\u202ec\x1b[0m",
    "\n",
    "é" * 9,
]


@pytest.mark.parametrize("text", TEXTS)
def test_every_token_is_spelled(any_tokenizer, text):
    ids = any_tokenizer.encode(text, bos=False)
    texts = spell(ids, any_tokenizer)
    assert len(texts) == len(ids) and all(texts)
    whole = "".join(t for t in texts if t != PART)
    assert whole in (visible(text), " " + visible(text))  # some write a space in front of a text
    assert all(c.isprintable() or c == "\n" for c in whole)


def test_a_newline_is_where_its_token_is(any_tokenizer):
    ids = any_tokenizer.encode("the\nthe", bos=False)
    before = any_tokenizer.encode("the", bos=False)
    assert spell(ids, any_tokenizer)[len(before)].startswith("↵\n")


def test_half_a_character_and_ids_without_text(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text(byte_level(), encoding="utf-8")
    tok = Tokenizer(tmp_path)
    face, end = tok.encode("👍", bos=False), tok.token_id("<|end|>")
    assert len(face) == 4
    assert spell([*face, end, *face], tok) == [PART, PART, PART, "👍", "<|end|>", PART, PART, PART, "👍"]
    texts = spell([*face[:2], end], tok)
    assert len(texts) == 3 and texts[-1] == "<|end|>" and "�" in "".join(texts)
    assert spell([5000], tok) == ["⟨id 5000⟩"] and spell([], tok) == []
    assert spell([1, 2], tokenizer) == ["<s>", "</s>"]
    assert (tokenizer.control_text(2), tokenizer.control_text(50), tokenizer.control_text(5000)) == ("</s>", None, None)


# ---- the terminal


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def two(tmp_path, tokenizer) -> Path:
    prompt, response = (tokenizer.encode(text, bos=False) for text in ("Why?\n", "Because \x1b[31m</s>."))
    write_shards(tmp_path, "train", [example(prompt, [*response, EOS]), example(prompt, [EOS])])
    write_shards(tmp_path, "val", [example([*prompt] * 400, [EOS])])
    return tmp_path


def test_show_without_colour(two, tokenizer):
    out = io.StringIO()
    show_examples(two, {}, 3, tokenizer, out)
    text = out.getvalue()
    [place] = [part.strip() for part in text.split("\n\n") if "Because" in part]
    assert re.fullmatch(
        r"train 0, source row 1,000: (\d+) tokens, (\d+) of them labels \(marked\); control tokens in ⟨ ⟩, labels "
        r"in ⟦ ⟧\n⟨<s>⟩ Why\?↵\n⟦ Because ⟨U\+001B⟩\[31m</s>\.⟨</s>⟩⟧",
        place,
    )
    n = len(tokenizer.encode("Why?\n", bos=False)) * 400 + 2
    assert (
        f"val 0, source row 1,000: {n:,} tokens, 1 of them labels" in text
        and f"\n… {n - HEAD - TAIL:,} tokens more …\n" in text
    )
    assert "\x1b" not in text and text.count("⟦") == 3 + 3  # each heading names the brackets


def test_show_in_colour_marks_the_same_tokens(two, tokenizer, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    plain, coloured = io.StringIO(), Terminal()
    show_examples(two, {}, 3, tokenizer, plain)
    show_examples(two, {}, 3, tokenizer, coloured)
    text = coloured.getvalue()
    assert text.count("\x1b[7m<s>\x1b[0m") == 3 and text.count("\x1b[32;7m</s>\x1b[0m") == 3 and "⟦" not in text
    bare = re.sub(r"\x1b\[[\d;]*m", "", text)
    brackets = plain.getvalue().replace("in ⟨ ⟩, labels in ⟦ ⟧", "in reverse")
    brackets = re.sub("⟨(</?s>)⟩", r"\1", brackets)
    assert bare == brackets.replace("⟦", "").replace("⟧", "")
    learned = "".join(re.findall(r"\x1b\[32(?:;7)?m(.*?)\x1b\[0m", text, re.DOTALL))
    assert learned == "".join(re.findall("⟦(.+?)⟧", brackets, re.DOTALL))


@pytest.mark.parametrize("setting", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_declined(two, tokenizer, monkeypatch, setting):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(*setting)
    out = Terminal()
    show_examples(two, {}, 1, tokenizer, out)
    assert "\x1b" not in out.getvalue() and "⟦" in out.getvalue()


def test_a_terminal_that_cannot_write_everything_gets_escapes(two, tokenizer):
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    show_examples(two, {}, 3, tokenizer, out)
    out.flush()
    assert b"\\u27e6" in raw.getvalue()  # ⟦


def test_as_many_are_shown_as_asked_for_and_the_page_shows_the_same(folder, tokenizer, page):
    for count in (1, 2, 3, 20):
        out = io.StringIO()
        show_examples(folder, FACTS, count, tokenizer, out)
        places = re.findall(r"^((?:train|val) .*): [\d,]+ tokens", out.getvalue(), re.MULTILINE)
        assert places == [e["title"].partition(":")[0] for e in page.shown()[:count]]
    few = io.StringIO()
    show_examples(folder, {}, 10**6, tokenizer, few)
    assert few.getvalue().count(" of them labels (marked)") == 172


def test_the_guide_shows_pictures_that_are_there_and_small():
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", (ROOT / "docs/data.md").read_text(encoding="utf-8"))
    assert len(pictures) == 3 and all((ROOT / "docs" / name).stat().st_size < 200_000 for name in pictures)


# ---- as a part of preparation


def test_prepare_writes_the_page_and_shows(tmp_path, checkpoint, capsys):
    from lit_sft.atomic import Manifest
    from lit_sft.prepare import prepare
    from lit_sft.prepare_args import PrepareCSVArgs
    from lit_sft.rows import Columns

    source = tmp_path / "a.csv"
    source.write_text("instruction,output\n" + "".join(f"Say {i}.,{i}!\n" for i in range(30)))
    args = PrepareCSVArgs(checkpoint_dir=str(checkpoint()), destination_path=str(tmp_path / "data"), show=2)
    contents = []
    for _ in range(2):  # the second time it replaces the first
        directory = prepare(args, source, "csv", Columns())
        contents.append((directory / "report.html").read_bytes())
        out = capsys.readouterr().out
        assert f"{directory / 'report.html'} shows what a model will learn" in out
        assert out.count(" of them labels (marked)") == 2 and "⟦" in out
    assert contents[0] == contents[1]
    assert set(Manifest.read(directory).files) == {"report.html", "train-00000.pt", "val-00000.pt"}
    page = Page(contents[0].decode())
    assert page.tables["counts"][1][:2] == ["train", "27"] and page.tables["counts"][2][:2] == ["val", "3"]
    assert page.tables["preparation"][1] == ["rows read", "30"]
    where = page.shown()[0]["title"].partition(": ")[0]
    row = int(re.fullmatch(r"(?:train|val) \d+, a\.csv row (\d+)", where)[1])
    assert f"\n{where}: " in out and f"\nSay {row - 1}.↵" in out  # rows are counted from 1
    with pytest.raises(InputError, match="--show -1 must not be negative"):
        PrepareCSVArgs(show=-1)
