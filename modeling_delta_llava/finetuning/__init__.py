"""Training of Delta-LLaVA with `transformers.Trainer`: data, samplers, collator, trainer and stage configs.

Nothing is imported here, so that `import modeling_delta_llava.finetuning` stays cheap. Start a run with
`delta-llava finetune CONFIG.yaml [--key value ...]`, or with several processes through
`accelerate launch -m modeling_delta_llava.finetuning CONFIG.yaml [--key value ...]`.
"""
