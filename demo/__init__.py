"""The embedded demo, all real: art, captioned scenes, tokenizer, decoder, vision tower, projector."""
