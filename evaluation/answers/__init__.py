"""Answers: how a model answers a benchmark, in processes of their own.

harness               evaluate: what is missing is asked of workers, the rest is in the cache
job, worker           what a worker is asked, and the process itself
journal, details      what it leaves: answers as they come, at last lm-eval's own results
fingerprint, backend  which model answers, and through what: transformers or vLLM
devices               where
lm, vllm_engine, logits_extrapolation   the three language models
divergence            how far models are from their base on the tokens of prompts
logprobs              log-probabilities of given responses, without lm-eval
"""
