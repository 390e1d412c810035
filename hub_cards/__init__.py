"""Hub repositories of Delta-LLaVA: variants as data, model cards, publishing and quantising.

Import by full name, `modeling_delta_llava.hub_cards`. The modules are `variants`, `card`, `preflight`, `publish` and
`quantize`; none of them is imported here, so that importing one does not load the others.
"""
