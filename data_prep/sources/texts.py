"""KEY.txt and KEY.json, which img2dataset writes beside KEY.jpg, in tars and in folders."""

from typing import Any

from pydantic import Field

from data_prep.images import Rejected
from data_prep.sources.source import MAX_TEXT_BYTES, Source, Weight, captions_of
from data_prep.text import parse_json
from models.config import Entries


class TextsSource(Source):
    """A source whose pictures have texts beside them."""

    captions: Entries[str, Weight] = Field(default_factory=dict)
    """JSON field, or txt for KEY.txt -> weight; empty: txt, or where there is none the field caption."""

    def describe(self, texts: dict[str, bytes]) -> dict[str, Any]:
        """The captions and metadata of an Item from its texts by extension; raises Rejected."""
        data = texts.get("json", b"{}")
        if len(data) > MAX_TEXT_BYTES:
            raise Rejected("broken_json", f"over {MAX_TEXT_BYTES} bytes")
        try:
            facts = parse_json(data)
        except ValueError as error:
            raise Rejected("broken_json", str(error)[:200]) from error
        if not isinstance(facts, dict):
            raise Rejected("broken_json", f"got {type(facts).__name__}, expected an object")
        # No other tool's status says so.
        if str(facts.get("status")).startswith("failed_to_"):
            detail = f"{facts['status']}: {facts.get('error_message') or ''}"[:200]
            raise Rejected("source_status", detail)
        captions = list[tuple[bytes | Rejected, float]]()
        default = {"txt" if "txt" in (texts | facts) else "caption": 1.0}
        for said, weight in (self.captions or default).items():
            if said == "txt" in texts:
                captions.append((texts["txt"], weight))
            else:
                captions += captions_of(said, facts.get(said), weight)
        return {"captions": tuple(captions), "metadata": facts}
