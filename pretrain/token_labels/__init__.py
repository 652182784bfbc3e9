"""Dense labels of images: made by an annotator, kept in one file, and cut as the crops are."""
