"""Parts of `ldt report`: reading run directories, curves, pictures and the page."""
