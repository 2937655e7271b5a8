"""What is done with a trained encoder: loading, embedding, searching, exporting. Nothing here trains."""
