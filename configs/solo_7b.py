"""SOLO-7B (arXiv 2407.06438): Mistral-7B that reads 32 x 32 pixel patches through one matrix.

    python -m neo_jax.train --config=configs/solo_7b.py --workdir=DIR --config.data.path=DATA

`:smoke` and `:tiny` behind the file name give its small forms (configs/small.py).

Model and the three pre-training stages: the released code and its tables (rows, iterations, rates, data).
Rows of 32,768 tokens, 128 a step; everything trains. 7.26 B parameters, with the 33,031 rows that the
creation script makes; the conversion script keeps 33,029, and which of them the released files have is not
known. Instruction tuning: 1.7 M samples in steps of 512, at most 4096 tokens each.

Guesses: the weights of stage 2 and 3 are millions of documents, known for the four largest image sources and
estimated for the others (text: one document per 1,060 tokens); 256 rows of 4096 tokens hold about 512 tuning
samples; the warm-up of tuning (the script's 50 ticks are 6 to 7 updates on its eight devices). The script
decays the tuning rate linearly. SOLO's own projection starts from an unpublished distilled one; here it is
random. Its tuning has a template of its own, and closes images as it opens them.
"""

from ml_collections import ConfigDict

from configs import backbones, base, small


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "smoke" or "tiny"."""
    c = base.get_config()
    c.name, c.family = "solo_7b", "solo"
    m = c.model
    backbones.mistral_7b(m)
    m.vocab_size = 33031
    m.sliding_window = 4096  # its attention sees one key more than Mistral's own
    m.embed.kind, m.embed.merge = "linear_patch", "add"
    m.embed.patch_size, m.embed.merge_size = 32, 1
    # Its Megatron run has tensor = 2, which does not divide vocab_size.
    backbones.full_size(c, "data/solo", devices=8)
    c.data.template, c.data.layout, c.data.resize = "solo", "solo", "solo"
    c.data.special_tokens = ("<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>")

    pretraining = dict(
        batch_size=128,
        accumulate=16,
        row_tokens=32768,
        row_patches=32768,
        min_pixels=32**2,
        max_pixels=1024**2,
        loss_reduction="token",
        peak_lr=5e-5,
        min_lr_ratio=0.1,
        warmup_steps=200,
        b1=0.9,
        b2=0.999,
        weight_decay=0.1,
    )
    c.stages = ("classes", "web", "anneal", "sft")
    c.stage.classes = base.stage(
        1525, mixture=ConfigDict({"imagenet21k": 0.7, "slimpajama": 0.3}), **pretraining
    )
    c.stage.web = base.stage(
        3481,
        mixture=ConfigDict(
            {
                "capfusion": 23.7,
                "websight": 1.92,
                "cc3m": 2.33,
                "detailed_captions": 0.37,
                "llavar": 0.4,
                "dvqa": 0.2,
                "ocr_vqa": 0.2,
                "figureqa": 0.1,
                "slimpajama": 4.1,
            }
        ),
        **pretraining,
    )
    c.stage.anneal = base.stage(
        300,
        mixture=ConfigDict(
            {
                "allava_laion": 0.47,
                "allava_vflan": 0.19,
                "llavar": 0.4,
                "dvqa": 0.2,
                "figureqa": 0.1,
                "slimpajama": 0.41,
            }
        ),
        **pretraining,
    )
    c.stage.sft = base.stage(
        3320,
        mixture=ConfigDict({"instructions": 1.0}),
        template="solo_sft",
        layout="solo_sft",
        row_tokens=4096,
        row_patches=4096,
        batch_size=256,
        accumulate=16,
        min_pixels=32**2,
        max_pixels=1024**2,
        loss_reduction="token",
        schedule="linear",
        peak_lr=1e-5,
        min_lr_ratio=0.0,
        warmup_steps=7,
        b1=0.9,
        b2=0.999,
        weight_decay=0.05,
    )
    return small.shrink(c, arg)
