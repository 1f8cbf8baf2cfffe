"""Any image-text-to-text model of transformers (LLaVA, PaliGemma, Qwen2-VL, ...), for ``model=hf``.

Nothing here knows a model by name: text part, connector and layers are found in the model, turns in its chat template.
"""
