"""What block-sparse decoding loses and to what: accuracy and perplexity over budgets, digests, queries and contexts."""
