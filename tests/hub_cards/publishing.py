"""Publishes a folder without a preflight, as a command would."""

import dataclasses
import json
import sys
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.hub_cards.contents import hash_files, list_files
from modeling_delta_llava.hub_cards.preflight import Preflight
from modeling_delta_llava.hub_cards.publish import PublishOptions, check_options, publish_checked

REPO = "user/model"


def publish_as_it_is(folder: Path, repo_id: str = REPO, pinned: str | None = None, **options) -> int:
    """The exit status; prints the report as JSON."""
    sources = {path: folder / path for path in list_files(folder)}
    checked, options = Preflight(sources, hash_files(sources), pinned), PublishOptions(**options)
    try:
        check_options(repo_id, options)
        report = publish_checked(checked, repo_id, options, lambda text: print("note:", text, file=sys.stderr))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(publish_as_it_is(Path(sys.argv[1])))
