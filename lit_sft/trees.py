"""Trees of messages, as Open Assistant collected them, → dialogues: the best-ranked path through each."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lit_sft.rows import Malformed, Row, kind_of

READY = "ready_for_export"
TEXTS = ("message_id", "text", "role")


@dataclass
class _Node:
    """A message with its row and what was answered to it."""

    row: Row
    cells: dict[str, Any]
    replies: list["_Node"] = field(default_factory=list)


def best_paths(rows: Iterable[Row], languages: Collection[str] = ()) -> Iterator[Row]:
    """A row {"messages": …} for each tree, with the number of the row that its root stands in.

    At every turn the path takes the reply of the lowest rank (0 is the best one; without a rank: last, in the order of
    the rows); it ends with an assistant's message. Left out: deleted messages with what hangs on them, trees that are
    not ready for export, those in none of ``languages`` (empty: all), and those without an answer.

    Args:
        rows: single messages (message_id, parent_id, text, role, and if there are lang, rank, deleted, tree_state), or
            whole trees (prompt: a message with replies, and if there is tree_state).
        languages: codes such as ``en``.

    A message that is malformed, or hangs on no tree, is a row with a Malformed.
    """
    nodes: dict[str, _Node] = {}
    roots: list[_Node] = []
    faults: list[Row] = []
    for row in rows:
        try:
            if isinstance(row.cells, Malformed):
                raise row.cells
            if not isinstance(row.cells, dict):
                raise Malformed(f"is {kind_of(row.cells)}, not an object with columns")
            if "prompt" in row.cells:
                roots.append(_tree(row, row.cells["prompt"], row.cells.get("tree_state")))
            else:
                node = _node(row, row.cells)
                if nodes.setdefault(node.cells["message_id"], node) is not node:
                    raise Malformed(f"column 'message_id' {node.cells['message_id']!r:.50} is there twice")
                if node.cells.get("parent_id") is None:
                    roots.append(node)
        except Malformed as error:
            faults.append(Row(row.number, row.line, error))
    faults += _hang_up(nodes)
    n_left = 0
    made = []
    for root in roots:
        path = _best_path(root, languages)
        n_left += len(path) < 2
        if len(path) > 1:
            turns = [{"role": node.cells["role"], "content": node.cells["text"]} for node in path]
            made.append(Row(root.row.number, root.row.line, {"messages": turns}))
    if n_left:
        print(f"left out {n_left} of {len(roots)} trees: not ready, of another language, or without an answer")
    yield from sorted(made + faults, key=lambda row: row.number)


def _node(row: Row, cells: Any) -> _Node:
    if not isinstance(cells, dict):
        raise Malformed(f"holds a message that is {kind_of(cells)}, not an object")
    for column in TEXTS:
        if not isinstance(cells.get(column), str):
            raise Malformed(f"column {column!r} is {kind_of(cells.get(column))}" + ", not text" * (column in cells))
    return _Node(row, cells)


def _tree(row: Row, cells: Any, state: Any) -> _Node:
    """A whole tree out of one row; what Open Assistant nests is at most some dozens deep."""
    root = _node(row, cells)
    root.cells = root.cells | ({} if state is None else {"tree_state": state})
    open_nodes = [root]
    while open_nodes:
        node = open_nodes.pop()
        replies = node.cells.get("replies") or []
        if not isinstance(replies, list):
            raise Malformed(f"'replies' of {node.cells['message_id']!r:.50} is {kind_of(replies)}, not a list")
        node.replies = [_node(row, reply) for reply in replies]
        open_nodes += node.replies
    return root


def _hang_up(nodes: dict[str, _Node]) -> Iterator[Row]:
    """Put every message under its parent; gives those that cannot be reached from a root."""
    for node in nodes.values():
        if (parent := nodes.get(node.cells.get("parent_id"))) is not None:
            parent.replies.append(node)
    open_nodes = [node for node in nodes.values() if node.cells.get("parent_id") is None]
    reached = set()
    while open_nodes:
        node = open_nodes.pop()
        reached.add(id(node))
        open_nodes += node.replies
    for node in nodes.values():
        if id(node) not in reached:
            parent = node.cells["parent_id"]
            yield Row(
                node.row.number, node.row.line, Malformed(f"column 'parent_id' {parent!r:.50} leads to no prompt")
            )


def _best_path(root: _Node, languages: Collection[str]) -> list[_Node]:
    """From the root to an assistant's message; empty when the tree is left out."""
    if root.cells.get("tree_state") not in (None, READY) or (languages and root.cells.get("lang") not in languages):
        return []
    path, node = [], root
    while node is not None and not node.cells.get("deleted"):
        path.append(node)
        usable = [reply for reply in node.replies if not reply.cells.get("deleted")]
        node = min(usable, key=lambda reply: _rank(reply.cells.get("rank")), default=None)
    return path[: len(path) // 2 * 2]


def _rank(value: Any) -> float:
    """A rank to sort by; what is none, null or NaN, comes last."""
    return value if isinstance(value, int | float) and value == value else float("inf")
