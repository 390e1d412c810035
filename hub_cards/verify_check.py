"""Runs the converter's verification of a Hub folder as a process of its own, so that its memory goes when it is done.

`python -m modeling_delta_llava.hub_cards.verify_check FOLDER` prints one line of JSON, `{"problems": [...]}`.
"""

import json
import sys
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.verify import verify


def main() -> int:
    try:
        checks = verify(Path(sys.argv[1]), progress=False)
    except UserError as error:
        print(json.dumps({"problems": [str(error)]}))
        return 1
    problems = [f"{check.name}: {check.detail}" for check in checks if check.passed is False]
    print(json.dumps({"problems": problems}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
