"""From fairseq's own logs to results: lines -> runs -> comparison -> tables, figures and a page."""
