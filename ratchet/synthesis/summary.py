"""A draft's summary as lines for people: what was kept, what was not and why, what it cost."""

from __future__ import annotations

from typing import Any

MOST_NAMED = 5


def summary_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"draft    {found['draft']}: {found['kept']} of {found['wanted']} rows, {found['doubted']} of them with doubts"]
    lines += _counts("refused", found["refused"])
    lines += _counts("failed", found["failures"])
    if "documents" in found:
        lines.append(f"read     {found['chunks']} chunks of {found['documents']} documents" + (f"; {found['unreadable']} could not be read:" if found["unreadable"] else ""))
        lines += [f"         {entry['name']}: {entry['why']}" for entry in found["unreadable_names"][:MOST_NAMED]]
    if "near_mistakes" in found:
        lines.append(f"chosen   {found['near_mistakes']} training rows near to mistakes, {found['drifted_prompts']} prompts of drifted topics")
    tokens = found["tokens"]
    cost = f"{found['cost']:.4f}" if found["priced"] else "unknown (synthesize.teacher has no prices)"
    lines.append(f"asked    {found['asked']} times, {found['recalled']} answers known before; {tokens['input']} tokens in, {tokens['output']} out; cost {cost}")
    if found["stopped"]:
        lines.append(f"stopped  {found['why']}")
    elif found["kept"] < found["wanted"]:
        lines.append("ended    nothing more could be asked: more documents or seeds, or a higher synthesize.rounds, give more rows")
    return lines


def _counts(name: str, counts: dict[str, int]) -> list[str]:
    return [f"{name:8} {sum(counts.values())}: {', '.join(f'{count} {reason}' for reason, count in counts.items())}"] if counts else []


def summary_card(found: dict[str, Any]) -> str:
    """As Markdown. A code block: names of documents are other people's text."""
    body = "\n".join(summary_lines(found)).replace("`", "'")
    return f"## {found['kept']} rows by {found['teacher']['model'].replace('`', '')}\n\n```text\n{body}\n```\n"
