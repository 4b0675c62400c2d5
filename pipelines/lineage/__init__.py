"""What came from what in a store: trace a picture back, a source onwards; plan to forget it; clean up."""

from pipelines.lineage.contents import Contents, read_contents
from pipelines.lineage.references import referenced

__all__ = ["Contents", "read_contents", "referenced"]
