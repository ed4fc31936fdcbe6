"""The report: what it says, in blocks; as a page, as Markdown, in pictures."""
