"""Reports of runs: content in blocks, rendered as HTML, Markdown and plots."""
