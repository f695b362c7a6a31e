"""The first ten minutes: from a folder of pictures to a trained LoRA and the page (`anima-start`)."""
