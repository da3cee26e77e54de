"""Every field of an experiment, with its meaning and default.

An experiment file starts from `get_config()` here and changes only what it needs:

    from configs import base

    def get_config(arg=""):
        config = base.get_config()
        config.name = "my_experiment"
        ...
        return config

Fields not listed here are refused: `neo_jax.config.resolve` checks a config against this file.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns a fresh config holding every field except the stages, which each experiment names."""
    c = ConfigDict()
    c.name = "base"  # run name, used in logs and the report
    c.family = "neo"  # whose Hugging Face layout an export has (neo_jax/convert)
    c.seed = 0  # every random stream is folded from (seed, step, purpose)
    c.init = ""  # folder of a run or of `convert import`: its newest checkpoint gives the first parameters
    c.branch = ""  # DIR/checkpoints/STEP of a run with these stages: go on from there, optimizer and data too
    c.model = model()
    c.objectives = objectives()
    c.data = data()
    c.mesh = mesh()
    c.train = train()
    c.eval = evaluation()
    c.stages = ()  # names of the stages to run, in order; each is a key of `stage`
    c.stage = ConfigDict()  # stage name -> stage(...)
    return c


def model() -> ConfigDict:
    """The function: one kind per slot (DESIGN words Embed, Coords, Mask) plus sizes."""
    c = ConfigDict()
    c.vocab_size = 2048  # rows of the token embedding; at least the tokenizer's size
    c.hidden_size = 256  # width D of the residual stream
    c.num_layers = 6  # all decoder layers, pre-buffer included
    c.pre_buffer = 2  # how many of them, at the front, are pre-buffer layers
    c.num_heads = 4  # query heads
    c.num_kv_heads = 2  # key/value heads; divides num_heads (GQA)
    c.head_dim = 64  # channels per head for T; H and W add head_dim / 2 each to q and k
    c.mlp_size = 768  # inner width of the feed-forward network
    c.mlp = "swiglu"  # feed-forward network: "swiglu" or "relu2"
    c.mlp_bias = False  # biases in it
    c.norm = "rms"  # "rms" (RMSNorm) or "layer" (LayerNorm with bias)
    c.norm_eps = 1e-6  # epsilon of every norm
    c.qk_norm = "rms"  # norm of each query and key head: "rms", "layer" or "none"
    c.attention_bias = ()  # which of "q", "k", "v", "o" have a bias
    c.tie_embeddings = False  # use the token embedding as the output head
    c.init_std = 0.02  # normal init of matrices and embeddings
    c.dtype = "float32"  # compute dtype: "float32" or "bfloat16"; weights stay float32
    c.reduce_dtype = "float32"  # in which gradients of the layers' matrices are summed: this or dtype
    c.quantization = "none"  # products of the layers: in 8 bits ("int8", "fp8": model/quantized.py) or "none"
    c.remat_policy = "none"  # kept for backward: all ("none"), layer inputs ("full"), "dots" too, "offload"
    c.attention = "auto"  # or "reference", "xla_chunked", "splash" (TPU), "triton", "cudnn", "mosaic" (GPU)
    c.mask = "image_bidirectional"  # "causal", "image_bidirectional" or "prefix"
    c.sliding_window = 0  # keys a query sees before itself; 0 = all of its document

    c.embed = ConfigDict()
    c.embed.kind = "conv_gelu_conv"  # or "linear_patch", "local_attention", "unshuffle_mlp", "none"
    c.embed.patch_size = 16  # pixels per side of the first convolution's patch
    c.embed.merge_size = 2  # patches per side merged into one token
    c.embed.hidden_size = 128  # channels between pixels and residual stream
    c.embed.rotate = True  # conv_gelu_conv: 2-D rotation of those channels (NEO); EVEv2 has none
    c.embed.rope_theta = 10000.0  # its base
    c.embed.bias = False  # linear_patch: a bias
    c.embed.norm = True  # unshuffle_mlp: a LayerNorm before the MLP (Mono-InternVL); HoVLE has none
    c.embed.tile_size = 448  # unshuffle_mlp: pixels per side of the tiles that images are cut into
    c.embed.slots = 0  # learned vectors for SLOT positions, by number (EVEv2: 0 class, 1 end of a row)
    c.embed.merge = "replace"  # a patch replaces its token's word embedding, or "add"s to it (SOLO)
    c.embed.pixel_mean = (0.485, 0.456, 0.406)  # RGB, on the 0..1 scale
    c.embed.pixel_std = (0.229, 0.224, 0.225)  # RGB, on the 0..1 scale

    c.coords = ConfigDict()
    c.coords.kind = "thw"  # "1d", "v2pe", "mrope", "thw" (Native-RoPE: extra channels) or "thw_split"
    c.coords.rope_theta = 1e6  # rotary base along t
    c.coords.rope_theta_hw = 1e4  # rotary base along h and w
    c.coords.rotary_fraction = 1.0  # 1d, v2pe: share of a head's channels that rotate, from the first on
    c.coords.sections = (16, 24, 24)  # mrope: channel pairs that follow t, h and w
    c.coords.delta = 1.0  # v2pe: how far a visual token moves t

    c.route = ConfigDict()
    c.route.attention = "shared"  # projections of q, k, v, o: "shared", or per "modality" (EVEv2)
    c.route.mlp = "shared"  # feed-forward network: or "modality" (EVEv2, BREEN), or learned "topk" experts
    c.route.norm = "shared"  # the two norms of a layer (EVEv2)
    c.route.visual_share = 0.0  # training: share of row_tokens kept for visual tokens; 0 = both run on all

    c.experts = ConfigDict()
    c.experts.num = 8  # route.mlp "topk": feed-forward networks to choose from
    c.experts.per_token = 1  # how many a token goes through, each mlp_size / per_token wide
    return c


def objectives() -> ConfigDict:
    """Sizes of the objectives' heads; which are trained, and how strongly, is each stage's choice."""
    c = ConfigDict()
    c.distill = ConfigDict()
    c.distill.teacher_size = 1024  # channels of the batch's teacher_features
    c.distill.every = 4  # the stream is tapped at the last layer and every so many below it
    return c


def data() -> ConfigDict:
    """What is read and how a record becomes a document."""
    c = ConfigDict()
    c.path = "data/quickstart"  # folder that data_pipelines.build wrote
    c.recipe = "quickstart"  # built at `path` when missing; "" = never build
    c.sources = ConfigDict()  # name -> source(...): read where they lie, in place of the folder `path`
    c.tokenizer = ""  # tokenizer.json of `sources`; the folder `path` has its own
    c.max_rejected = 0.01  # largest share of a source's records in `path` that may be rejected before a stop
    c.locales = ("en",)  # caption languages
    c.vocab_size = 2048  # size of the BPE trained on the captions
    c.image_size = 128  # pixels per side at which drawings are rendered and stored
    c.template = "plain"  # what a family writes around text and images (data_pipelines/template.py)
    c.special_tokens = ()  # names that are appended to the vocabulary where it lacks them, in this order
    c.layout = "neo"  # how an image lies in the token table: markers, row ends (data_pipelines/layout.py)
    c.resize = "neo"  # how large an image becomes (data_pipelines/resize.py)
    c.resize_canvas = (1080, 1920)  # fuyu: height and width; scaled to an area of stage.max_pixels
    c.resize_grid = (336, 14)  # eve: pixels per side of the teacher's image and of its patches
    c.number_images = False  # write "Image-1: " before each of several images
    c.max_image_pixels = 100_000_000  # larger image files are rejected, as are ...
    c.max_image_bytes = 100_000_000  # ... files of more bytes, ...
    c.min_image_side = 1  # ... images smaller than this on a side, in pixels, ...
    c.max_aspect = 200.0  # ... and those whose longer side is more than this times the shorter
    c.augment = True  # training only: random background colour and small shifts
    c.overlong = "reject"  # documents that no row holds: "reject", "split_text" or "shrink_images"
    c.window = 512  # records that are packed at once; more fill rows better and take more memory
    c.lanes = 1  # streams that make up a batch; as many processes can share the reading without overlap
    c.shuffle = True  # training order; False reads in stored order
    c.prefetch = 4  # batches prepared ahead
    c.workers = 0  # processes that read and decode; 0 = a thread of the training process
    c.index_path = "data/index"  # local folder: where records start in tar and JSON files
    c.quarantine = ""  # file that takes a line of JSON for every rejected record; "" = none
    return c


def source(kind: str, path: str, **changes: object) -> ConfigDict:
    """One entry of data.sources: records of any kind, where they lie."""
    c = ConfigDict()
    c.kind = kind  # "webdataset", "parquet", "json", "tfds", "array_record" (data_pipelines/sources)
    c.path = path  # file, folder or glob, here or behind a URL: gs://, s3://, hf://
    c.split = "train"  # "train", or one of config.eval.splits; with tfds, its own name
    c.form = "caption"  # what a record holds, one of FORMS in data_pipelines/forms.py
    c.template = ""  # "" = that of the stage
    c.image_fields = ()  # names of the fields that hold images; () = the usual ones
    c.text_fields = ()  # names of the fields that hold text; () = the usual ones
    c.image_root = ""  # folder or URL that image paths are relative to; "" = where the file lies
    c.max_rejected = 0.01  # largest share of records that may be rejected before the run stops
    for key, value in changes.items():
        if key not in c:
            raise ValueError(f"source() has no field {key!r}; it has {sorted(c)}")
        c[key] = value
    return c


def mesh() -> ConfigDict:
    """The device mesh. The product of the four axes equals num_devices."""
    c = ConfigDict()
    c.num_devices = 1  # devices this run expects over all processes
    c.num_slices = 1  # groups of devices joined by the data-centre network only; `data` is split over them
    c.data = 1  # data parallel, weights replicated
    c.fsdp = 1  # data parallel, weights sharded
    c.tensor = 1  # tensor parallel
    c.context = 1  # sequence parallel
    return c


def train() -> ConfigDict:
    """Cadence and limits of the run."""
    c = ConfigDict()
    c.log_every = 20  # steps between metric lines
    c.eval_every = 500  # steps between held-out losses; 0 = only at the end
    c.save_every = 500  # steps between checkpoints
    c.keep_checkpoints = 2  # newest checkpoints kept
    c.keep_steps = (0,)  # steps whose checkpoints are saved and kept besides, to branch from; 0 = none
    c.local_folder = ""  # of each host, in memory: for checkpoints in between (emergency.py); "" = none
    c.local_every = 50  # steps between the checkpoints in local_folder
    c.max_nonfinite_steps = 10  # steps with a non-finite loss or gradient before the run stops
    c.start_timeout_s = 3600.0  # seconds until every process has data, state and compiled programs
    c.hang_timeout_s = 900.0  # seconds without a finished step, evaluated batch or saved checkpoint: a hang
    c.silence_timeout_s = 60.0  # seconds without a sign of life of a process, after which the others end
    return c


def evaluation() -> ConfigDict:
    """Held-out evaluation."""
    c = ConfigDict()
    c.splits = ("val_render", "val_combo", "val_concept")  # data splits that are evaluated
    c.num_candidates = 256  # images and captions in the retrieval matrix of each split
    c.num_generate = 256  # images captioned for exact match and tag F1
    c.max_new_tokens = 48  # longest generated caption
    c.batch_size = 64  # images per evaluation batch
    return c


def stage(steps: int, **changes: object) -> ConfigDict:
    """One training stage: data mixture, trainable parameters, budgets, optimizer, schedule."""
    c = ConfigDict()
    c.steps = steps  # optimizer steps of this stage
    # source -> weight, or ((step of the stage, weight), ...), linear between; "all" = each source by its size
    c.mixture = ConfigDict({"all": 1.0})  # which documents
    c.objectives = ConfigDict({"ntp": 1.0})  # objective -> weight: "ntp", "distill", "balance"
    c.teacher_ratio = 1  # distill: image tokens per side of one feature of the teacher
    c.trainable = (".*",)  # regular expressions; a parameter trains if its whole path matches one
    c.batch_size = 8  # packed rows per optimizer step, over all hosts
    c.accumulate = 1  # gradient accumulation: batch_size is cut into this many parts
    c.row_tokens = 512  # L: tokens per packed row
    c.row_patches = 512  # P: image tokens per packed row
    c.min_pixels = 128 * 128  # least pixels of one image after resizing
    c.max_pixels = 128 * 128  # most pixels of one image after resizing
    c.template = ""  # of its documents, where their source names none; "" = data.template
    c.layout = ""  # how its images lie in the token table; "" = data.layout
    c.tags_share = 1.0  # share of training documents with tags; the others break off after the label's line
    c.parallel_share = 0.0  # share of training documents whose caption is predicted without seeing it (CapPa)
    c.loss_reduction = "square"  # weight of one of a document's n tokens: token 1, sample 1/n, square n**-0.5
    c.schedule = "cosine"  # after the warm-up: "cosine" or "linear" down to min_lr_ratio * peak_lr, or "wsd"
    c.cooldown_share = 0.2  # wsd: share of the steps, at the end, that fall there; constant before
    c.peak_lr = 1e-3  # learning rate at the end of the warm-up
    c.min_lr_ratio = 0.1  # learning rate at the last step, as a share of peak_lr
    c.warmup_steps = 100  # linear from 0 to peak_lr
    c.b1 = 0.9  # AdamW decay of the mean gradient
    c.b2 = 0.95  # AdamW decay of the mean squared gradient
    c.adam_eps = 1e-8  # AdamW epsilon
    c.weight_decay = 0.01  # not applied to biases and norms
    c.clip_norm = 1.0  # global gradient norm
    for key, value in changes.items():
        if key not in c:
            raise ValueError(f"stage() has no field {key!r}; it has {sorted(c)}")
        c[key] = value
    return c
