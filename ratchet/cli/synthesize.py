"""`ratchet synthesize`."""

from __future__ import annotations

from typing import Annotated

import typer

from ratchet.cli.context import Json, read_config, ready_root, say, show


def synthesize(
    documents: Annotated[
        list[str] | None,
        typer.Option(
            "--documents", metavar="PLACE", help="File, folder, glob or URL to ask about; may be given again."
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--count", min=1, metavar="ROWS", help="Rows to keep; otherwise synthesize.count."),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="documents; seeds: more rows like known ones; paraphrase: other wordings where the model is weak.",
        ),
    ] = "documents",
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds",
            metavar="FILE",
            help="JSON Lines to show the teacher; otherwise the prepared training rows.",
        ),
    ] = "",
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="DRAFT", help="Go on with a draft; nothing is asked twice."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Let a teacher model write rows, for people to review; its address stands in params.yaml, its key in RATCHET_TEACHER_KEY.

    Example: ratchet synthesize --documents 'docs/*.md' --count 200
    """
    from ratchet.errors import UserError

    if resume and (documents or seeds or mode != "documents"):
        raise UserError(
            "a resumed draft keeps its mode, documents and seeds",
            remedy="give --resume with --count alone, or begin a new draft",
        )
    root = ready_root(clean=False)
    from flows.synthesize import synthesize as flow
    from ratchet.synthesis.draft import summary_lines

    done = flow(root=str(root), mode=mode, documents=documents, seeds=seeds, count=count, resume=resume)

    def tell() -> None:
        say("\n".join(summary_lines(done)))
        if done.stopped:
            say(f"to go on: ratchet synthesize --resume {done.draft}")
        if done.kept:
            say(
                f"next: ratchet review status, or http://127.0.0.1:{read_config(root).gateway.port}/review; "
                f"then ratchet ingest --source review --draft {done.draft}"
            )

    show(done.to_json(), as_json, tell)
