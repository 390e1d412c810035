"""The card of a repository that `push_to_hub` makes: what holds for every Delta-LLaVA model, and nothing else."""

from pathlib import Path

from huggingface_hub import file_exists

from .configuration_delta_llava import TRANSFORMERS_RANGE

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- delta-llava
- llava
- multimodal
- visual-token-compression
- custom_code
- arxiv:2512.18910
---

# {name}

A [Delta-LLaVA](https://arxiv.org/abs/2512.18910) vision-language model, pushed with the unofficial Hugging Face port.
Neither the authors of the paper nor [their code](https://github.com/mzamini92/Delta-LLaVA) have a part in it, and no
score of the paper applies to these weights. [arXiv 2604.14044](https://arxiv.org/abs/2604.14044) is an unrelated paper
of the same name.

## Usage

Needs `transformers{transformers}`. Read the code in this repository, then put the commit that you have read in place
of `main`:

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="{repo_id}", revision="main", trust_remote_code=True, dtype="auto")
content = [{{"type": "image", "url": "photo.jpg"}}, {{"type": "text", "text": "What is in this picture?"}}]
messages = [{{"role": "user", "content": content}}]
print(ask(text=messages, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```

## Training, licence, limits

Nothing is recorded here. Weights keep the licences of the language model, the vision tower and the data that they come
from. Few visual tokens cost detail, and answers can state things that are not in the picture.
"""


class HubCardMixin:
    """For what has `push_to_hub`: gives a repository without a card this one, in the same commit."""

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, token=None, **kwargs):
        # A card in the user's own folder, or on the Hub already, says more than this one.
        if "README.md" not in files_timestamps and not file_exists(repo_id, "README.md", token=token):
            card = CARD.format(name=repo_id.split("/")[-1], repo_id=repo_id, transformers=TRANSFORMERS_RANGE)
            Path(working_dir, "README.md").write_text(card, encoding="utf-8")
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, token=token, **kwargs)
