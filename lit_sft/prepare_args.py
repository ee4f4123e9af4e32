"""The flags of scripts/prepare_*.py: which rows, how they become examples, which are chosen, and in what order."""

from dataclasses import dataclass, fields
from typing import Literal

from lit_sft.args import CHECKPOINT_DIR_HELP, STYLES, Args, arg
from lit_sft.row_fields import KNOWN, parse_ignored


@dataclass
class PrepareArgs(Args):
    """Flags that every scripts/prepare_*.py has."""

    checkpoint_dir: str | None = arg(None, CHECKPOINT_DIR_HELP + " (default: the only one there is)")
    destination_path: str | None = arg(None, "folder to write the shards to (default: data/<name>)")
    overwrite: bool = arg(False, "replace what the folder holds, also where that was made of other data")
    data_file: str | None = arg(
        None, "file to read, or its address: .json, .jsonl, .csv, .tsv, .parquet or .arrow", "csv_path", "csv_dir"
    )
    data_file_url: str | None = arg(None, "address of a file to fetch and read")
    data_file_name: str | None = arg(None, "name under which a fetched file is kept in data/ (default: its own)")
    data_repo_id: str | None = arg(None, "dataset on the Hub, read when no file is given", "repo_id")
    data_config: str | None = arg(None, "configuration (subset) of the Hub dataset")
    data_split: str = arg("train", "split of the Hub dataset")
    data_val_split: str | None = arg(None, "its split to take as val, as it is, so that none is drawn from the other")
    val_file: str | None = arg(None, "file to take as val, as it is, so that none is drawn from the other data")
    max_seq_length: int | None = arg(None, "longest example kept, in tokens (default: the model's context)")
    val_split_fraction: float = arg(0.1, "share of the samples held out for validation", "test_split_fraction")
    seed: int = arg(42, "seed of the train/val split, of what is drawn and of the order")
    mask_prompt: bool = arg(True, "learn the responses only, not the prompts", "mask_inputs")
    prompt_style: str | None = arg(None, f"{STYLES}; default: what the checkpoint's files ask for, else alpaca")
    template_applied: bool | None = arg(
        None, "a template is already written in the texts: true takes them as they are, false as plain characters"
    )
    system_prompt: str | None = arg(None, "system message of dialogues that have none (default: the style's own)")
    on_overflow: Literal["truncate", "drop", "error"] = arg("truncate", "what happens to a too long example's response")
    on_error: Literal["fail", "skip"] = arg(
        "fail", "what malformed samples do: end the command, or go to skipped.jsonl beside the shards"
    )
    ignore_fields: str | None = arg(
        None, "columns and keys of turns, with commas between, to leave unread although they change what is learned"
    )
    max_examples: int | None = arg(None, "most examples taken of a source, drawn at random (default: all)")
    order: Literal["shuffle", "as_given", "length", "source"] = arg(
        "shuffle", "order of training: shuffled anew each epoch; as the data have it; shortest first; source by source"
    )
    deduplicate: Literal["none", "exact", "near"] = arg(
        "none", "leave out samples that repeat an earlier one, word for word or nearly (MinHash)"
    )
    near_duplicate_similarity: float = arg(0.8, "Jaccard similarity of word triples from which on one is a repetition")
    on_leakage: Literal["keep", "move", "drop"] = arg(
        "keep", "val examples whose prompt is in train too are counted; move: to train; drop: leave them out"
    )
    min_tokens: int | None = arg(None, "leave out shorter examples")
    max_tokens: int | None = arg(None, "leave out longer examples; others may still be cut to max_seq_length")
    min_response_tokens: int | None = arg(None, "leave out examples with fewer tokens after the first prompt")
    min_alphanumeric_share: float | None = arg(
        None, "leave out responses with a smaller share of letters and digits among what is no white space"
    )
    max_repetition_share: float | None = arg(
        None, "leave out responses in which a larger share of the stretches of three tokens are repetitions"
    )
    keep_scores: str | None = arg(
        None, "file of ratings: a table with a column score (and row, from 1), or a score a line; needs --min_score"
    )
    min_score: float | None = arg(None, "leave out samples rated lower in --keep_scores")
    num_workers: int | None = arg(None, "processes that tokenize (default: one a core, 8 at most); same bytes for any")
    show: int = arg(0, "examples to print afterwards, what is learned marked; report.html shows more")
    ignore_index: int | None = arg(None, "accepted as in Lit-GPT, without effect: labels are masked by position")
    access_token: str | None = arg(None, "Hub token for gated datasets; the environment's HF_TOKEN is used by default")

    def checks(self) -> dict[str, bool]:  # noqa: D102
        sources = ("data_file", "data_file_url", "data_repo_id")
        usual = {f.name: f.default for f in fields(self)}  # a script may have a dataset of its own
        named = [f"--{name}" for name in sources if getattr(self, name) not in (None, usual[name])]
        return (
            super().checks()
            | {
                f"{' and '.join(named)} name different data; give one": len(named) > 1,
                f"--max_seq_length {self.max_seq_length} must be at least 2": (self.max_seq_length or 2) < 2,
                f"--val_split_fraction {self.val_split_fraction} must be in [0, 1)": not 0
                <= self.val_split_fraction
                < 1,
                "--keep_scores and --min_score go together": (self.keep_scores is None) != (self.min_score is None),
                f"--show {self.show} must not be negative": self.show < 0,
                f"--ignore_fields {self.ignore_fields!r}: known are {', '.join(KNOWN.values())}": not parse_ignored(
                    self.ignore_fields
                )
                <= KNOWN.keys(),
                "--keep_scores is empty": self.keep_scores == "",
                "--min_score must be a number": self.min_score is not None and self.min_score != self.min_score,
            }
            | self._bounds()
        )

    def _bounds(self) -> dict[str, bool]:
        counts = ("max_examples", "min_tokens", "max_tokens", "min_response_tokens", "num_workers")
        shares = ("min_alphanumeric_share", "max_repetition_share", "near_duplicate_similarity")
        given = {name: value for name in (*counts, *shares) if (value := getattr(self, name)) is not None}
        return {f"--{name} {given[name]} must be above 0": given[name] < 1 for name in counts if name in given} | {
            f"--{name} {given[name]} must be in [0, 1]": not 0 <= given[name] <= 1 for name in shares if name in given
        }


@dataclass
class PrepareAlpacaArgs(PrepareArgs):
    """Flags of scripts/prepare_alpaca.py."""

    data_repo_id: str | None = arg(None, "dataset on the Hub to read in place of the variant's", "repo_id")
    variant: Literal["cleaned", "original", "libre", "gpt4"] = arg("cleaned", "which Alpaca, when no source is given")
    val_split_fraction: float = arg(0.03865, "share of the samples held out for validation", "test_split_fraction")


@dataclass
class PrepareLimaArgs(PrepareArgs):
    """Flags of scripts/prepare_lima.py."""

    data_repo_id: str | None = arg("GAIR/lima", "dataset on the Hub, read when no file is given", "repo_id")
    include_multiturn_conversations: bool = arg(False, "whole dialogues with their history, not first turns only")


@dataclass
class PrepareDollyArgs(PrepareArgs):
    """Flags of scripts/prepare_dolly.py."""

    data_repo_id: str | None = arg(
        "databricks/databricks-dolly-15k", "dataset on the Hub, read when no file is given", "repo_id"
    )


@dataclass
class PrepareLongFormArgs(PrepareArgs):
    """Flags of scripts/prepare_longform.py."""

    data_repo_id: str | None = arg("akoksal/LongForm", "dataset on the Hub, read when no file is given", "repo_id")
    data_val_split: str | None = arg("validation", "its split to take as val, as it is; null: draw one from train")


@dataclass
class PrepareFlanArgs(PrepareArgs):
    """Flags of scripts/prepare_flan.py."""

    data_repo_id: str | None = arg("Muennighoff/flan", "dataset on the Hub, read when no file is given", "repo_id")
    data_val_split: str | None = arg("test", "its split to take as val, as it is; null: draw one from train")
    subsets: str | None = arg(None, "tasks to read, by names with commas between: aeslc,trec (default: all 66)")


@dataclass
class PrepareOASSTArgs(PrepareArgs):
    """Flags of scripts/prepare_oasst.py."""

    data_repo_id: str | None = arg("OpenAssistant/oasst1", "dataset on the Hub, read when no file is given", "repo_id")
    data_val_split: str | None = arg("validation", "its split to take as val, as it is; null: draw one from train")
    languages: str | None = arg(None, "keep trees in these, by codes with commas between: en,de (default: all)", "lang")


@dataclass
class PrepareCSVArgs(PrepareArgs):
    """Flags of scripts/prepare_csv.py."""

    instruction_column: str | None = arg(None, "column of the instruction (default: recognised by its name)")
    input_column: str | None = arg(None, "column of the optional input")
    output_column: str | None = arg(None, "column of the response")
    messages_column: str | None = arg(None, "column of whole dialogues: lists of {role, content} or {from, value}")
    text_column: str | None = arg(None, "column of plain text without prompts, learned whole")
    system_column: str | None = arg(None, "column of the system message, of instructions or beside messages")
    history_column: str | None = arg(None, "column of the turns before the instruction: lists of [user, assistant]")


@dataclass
class PrepareDatasetArgs(PrepareCSVArgs):
    """Flags of scripts/prepare_dataset.py."""

    mix: str | None = arg(
        None, "YAML list of sources to mix: data_file or data_repo_id, weight, max_examples, repeat, … (docs/data.md)"
    )

    def checks(self) -> dict[str, bool]:  # noqa: D102
        sources = (self.data_file, self.data_file_url, self.data_repo_id, self.mix)
        given = [value for value in sources if value is not None]
        mixed = self.mix is not None
        return super().checks() | {
            "give one of --data_file, --data_repo_id and --mix (or --data_file_url)": len(given) != 1,
            "--mix is empty": self.mix == "",
            "--keep_scores belongs to a source of --mix": mixed and self.keep_scores is not None,
            "--val_file and --data_val_split do not go with --mix": mixed
            and (self.val_file is not None or self.data_val_split is not None),
        }
