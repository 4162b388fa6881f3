"""What a prefill reports, and where its device time goes."""
