"""Results from fairseq's own logs: lines -> runs -> comparison -> tables, figures and a page."""
