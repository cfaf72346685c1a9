"""What a record says of prepared data, read from their manifest."""


def bytes_per_token(manifest: dict) -> dict[str, float | None]:
    """UTF-8 bytes of text per predicted token, by split (the first token of a split is not predicted); None of tokens
    whose maker did not say."""
    splits = manifest["splits"]
    return {
        name: None if s["text_bytes"] is None else s["text_bytes"] / (s["tokens"] - 1) for name, s in splits.items()
    }


def num_documents(manifest: dict) -> int:
    return sum(s["documents"] for s in manifest["splits"].values())


def describe(manifest: dict, *, train_tokens: int, epoch_tokens: int) -> dict:
    """Describes a source, of whose train split so many tokens are read, and so many in an epoch.

    Bits per byte = loss in nats per token × tokens_per_byte / ln 2.
    """
    splits, per_token = manifest["splits"], bytes_per_token(manifest)["validation"]
    text_bytes = [s["text_bytes"] for s in splits.values()]
    return {
        "source": manifest["source"],
        "source_version": manifest["source_version"],
        "licence": manifest["licence"],
        "tokenizer": manifest["tokenizer"]["name"],
        "fingerprint": manifest["fingerprint"],
        "split_rule": manifest["split_rule"],
        "vocab_size": manifest["tokenizer"]["vocab_size"],
        "train_tokens": train_tokens,
        "epoch_tokens": epoch_tokens,
        "validation_tokens": splits["validation"]["tokens"],
        "tokens_per_byte": None if per_token is None else 1 / per_token,
        "num_documents": num_documents(manifest),
        "num_validation_documents": splits["validation"]["documents"],
        "num_duplicates_removed": manifest["num_duplicates_removed"],
        "num_near_duplicates_removed": manifest["num_near_duplicates_removed"],
        # Of those, for a document that another source of the mixture holds out.
        "num_near_duplicates_across_sources": manifest.get("num_near_duplicates_across_sources", 0),
        "num_empty_removed": manifest["num_empty_removed"],
        "num_lossy_validation_documents": manifest["num_lossy_validation_documents"],
        "text_bytes": None if None in text_bytes else sum(text_bytes),
    }
