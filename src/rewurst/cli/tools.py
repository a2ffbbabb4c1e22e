"""The commands beside LightningCLI's: prepare, export, generate. What they run is imported when it is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import UsageError
from .parser import Parsed, Parser


def run(args: list[str]) -> None:
    """Parses a tool's command line and runs it."""
    parsed = _parser().parse_args(args)
    parsed.run(parsed)


def _parser() -> Parser:
    parser = Parser(prog="rewurst")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    _prepare(commands.add_parser("prepare", help="tokenizers, and text into shards"))
    _export(commands.add_parser("export", help="checkpoints into other layouts"))
    _generate(commands.add_parser("generate", help="text and images from a model"))
    return parser


def _prepare(parser: Parser) -> None:
    what = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    tokenizer = _tool(what, "tokenizer", "train a byte-level BPE tokenizer", _run_prepare_tokenizer)
    _add_sources(tokenizer)
    tokenizer.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    tokenizer.add_argument("--vocab_size", type=int, required=True, help="tokens, end token and 256 bytes included")
    text = _tool(what, "text", "tokenize text and pack it into shards: OUT/train and OUT/val", _run_prepare_text)
    _add_sources(text)
    text.add_argument("--out", required=True, help="folder to write, new or empty; with ray, or its URL")
    text.add_argument("--tokenizer", required=True, help="folder or hub name of a fast tokenizer")
    text.add_argument("--sequence_length", type=int, default=2048, help="tokens predicted in a row")
    text.add_argument("--held_out", type=float, default=0.0, help="share of documents kept for validation")
    text.add_argument(
        "--workers", type=int, help="processes that tokenize (default: 1; with ray: all there is room for)"
    )
    _add_engine(text)
    text.add_argument("--rows_per_shard", type=int, help="rows in a shard (default: about 256 MiB)")
    index = _tool(what, "index", "index tars that are there already, of token rows or of images", _run_prepare_index)
    index.add_argument("shards", nargs="+", metavar="SHARD", help="path, glob, braces, folder or URL of tars")
    index.add_argument("--out", type=Path, help="folder of the index (default: that of the tars)")
    index.add_argument("--kind", choices=("text", "images"), help="(default: what the first sample looks like)")
    index.add_argument("--tokenizer", help="of token rows: folder or hub name of the tokenizer that made them")
    index.add_argument("--caption_key", help="of images: key of the .json with the caption (default: the .txt)")
    index.add_argument("--max_corrupt", type=float, help="of images: share that may be unreadable (default: 0.1)")
    index.add_argument("--workers", type=int, default=1, help="processes that scan")
    index.add_argument("--overwrite", action="store_true", help="replace an index that is there")
    _prepare_images(_tool(what, "images", "captioned images into shards: OUT/train and OUT/val", _run_prepare_images))
    _prepare_latents(_tool(what, "latents", "latents of a corpus of images into shards", _run_prepare_latents))
    verify = _tool(what, "verify", "compare every byte of a folder's shards with its index", _run_prepare_verify)
    verify.add_argument("folder", type=Path, help="folder with index.json")


def _prepare_images(images: Parser) -> None:
    source = "folder of images with a .txt beside each, .jsonl or .parquet with names and captions, or builtin:shapes"
    images.add_argument("source", metavar="SOURCE", help=source)
    images.add_argument("--out", required=True, help="folder to write, new or empty; with ray, or its URL")
    images.add_argument("--held_out", type=float, default=0.0, help="share of pictures kept for validation")
    images.add_argument("--image_size", type=int, help="shortest side that larger pictures are made to have")
    images.add_argument("--format", help="jpg, png or webp to encode all again (default: files stay as they are)")
    images.add_argument("--quality", type=int, default=95, help="of JPEG and WebP")
    images.add_argument("--workers", type=int, help="processes that read and check (default: 1; with ray: all)")
    _add_engine(images)
    images.add_argument("--max_corrupt", type=float, default=0.05, help="share that may be corrupt, and is left out")
    images.add_argument("--skip_without_caption", action="store_true", help="leave pictures without a caption out")
    images.add_argument("--image_field", help="with the file name (default: file_name, image or path)")
    images.add_argument("--caption_field", help="with the caption (default: text or caption)")
    images.add_argument("--samples_per_shard", type=int, help="pictures in a shard (default: about 256 MiB)")
    images.add_argument("--pictures", type=int, default=9, help="drawn of each combination of builtin:shapes")
    images.add_argument("--seed", type=int, default=0, help="of builtin:shapes")
    images.add_argument("--overwrite", action="store_true", help="replace what was prepared there")


def _prepare_latents(latents: Parser) -> None:
    latents.add_argument("source", metavar="FOLDER", help="images, with index.json")
    latents.add_argument("--out", required=True, help="folder to fill, or to go on filling, or its URL")
    latents.add_argument(
        "--stage_b", required=True, metavar="CKPT", help="Stage B with its compressor, or a compressor"
    )
    latents.add_argument("--image_size", type=int, required=True, help="side in pixels at which images are shown")
    latents.add_argument(
        "--what", dest="arrays", default="z", help="comma-separated: z, a (Stage A's latents), text (text states)"
    )
    latents.add_argument("--text_encoder", help="of text: folder or hub name of a frozen CLIP text model")
    latents.add_argument("--stage_a", help="of a: checkpoint or folder (default: the one that CKPT names)")
    latents.add_argument("--max_aspect", type=float, default=1.0, help="longest side over shortest of shapes")
    latents.add_argument("--bucket_multiple", type=int, default=64, help="of which the sides of shapes are multiples")
    latents.add_argument("--resize", type=int, help="side of a square that images cover before they are cropped")
    latents.add_argument("--batch_size", type=int, default=32, help="images that networks see at once")
    latents.add_argument("--workers", type=int, default=0, help="processes that decode images (with ray: a shard)")
    _add_engine(latents)
    latents.add_argument("--device", default="cpu", help="such as cuda")
    latents.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of what is stored")
    latents.add_argument("--samples_per_shard", type=int, help="(default: up to 256 MiB)")
    latents.add_argument("--shard_of", default="0/1", metavar="I/N", help="this process makes share I of N")
    latents.add_argument("--max_corrupt", type=float, default=0.05, help="share of images that may be corrupt")
    latents.add_argument("--overwrite", action="store_true", help="replace what was prepared there")


def _export(parser: Parser) -> None:
    what = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    hf = _tool(what, "hf", "write a checkpoint as a folder that transformers loads", _run_export_hf)
    hf.add_argument("checkpoint", type=Path, metavar="CKPT", help="Lightning checkpoint of CausalLM")
    hf.add_argument("out", type=Path, metavar="OUT", help="new folder")
    hf.add_argument("--tokenizer", type=Path, help="tokenizer's folder (default: the one the data was prepared with)")
    hf.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    diffusers = _tool(what, "diffusers", "write a cascade as folders that diffusers loads", _run_export_diffusers)
    for stage, name in (("a", "VQGAN"), ("b", "U-Net and Semantic Compressor"), ("c", "prior")):
        diffusers.add_argument(f"--stage_{stage}", type=Path, required=True, metavar="CKPT", help=name)
    diffusers.add_argument(
        "--stage_c_mean", type=Path, metavar="CKPT", help="write the mean of this prior and that one"
    )
    diffusers.add_argument("--text_encoder", help="of Stage B, folder or hub name (default: the checkpoint's)")
    diffusers.add_argument("--prior_text_encoder", help="of Stage C (default: its checkpoint's, or Stage B's)")
    diffusers.add_argument("out", type=Path, metavar="OUT", help="new folder")

    weights = _tool(what, "weights", "write a checkpoint's weights as one safetensors file", _run_export_weights)
    weights.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint, a file or a folder of shards")
    weights.add_argument("out", type=Path, metavar="OUT", help="new .safetensors file")
    weights.add_argument("--prefix", default="", help="only names that begin so, without it: model. for CausalLM's")


def _generate(parser: Parser) -> None:
    what = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    text = _tool(what, "text", "continue a prompt", _run_generate_text)
    text.add_argument("folder", metavar="FOLDER", help="Hugging Face folder or hub name")
    text.add_argument("prompt", metavar="PROMPT", help="text to continue")
    text.add_argument("--max_new_tokens", type=int, default=100, help="most tokens added")
    text.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    text.add_argument("--top_p", type=float, default=0.95, help="draw from the likeliest tokens of this probability")
    text.add_argument("--seed", type=int, default=0, help="seed of the draw")
    image = _tool(what, "image", "draw pictures for a prompt", _run_generate_image)
    image.add_argument("folder", metavar="FOLDER", help="exported cascade, or its decoder folder (with --prior)")
    image.add_argument("prompt", metavar="PROMPT", help="a prompt, or @FILE with one a line")
    image.add_argument("--out", type=Path, required=True, help="image file; several become NAME-0, NAME-1, ...")
    image.add_argument("--prior", help="folder of the prior, where it lies apart")
    image.add_argument("--negative_prompt", help="what to guide away from")
    image.add_argument("--images", type=int, default=1, help="pictures of each prompt")
    image.add_argument("--height", type=int, default=512, help="pixels")
    image.add_argument("--width", type=int, default=512, help="pixels")
    image.add_argument("--prior_steps", type=int, default=60, help="steps of Stage C")
    image.add_argument("--guidance", type=float, default=4.0, help="guidance of Stage C")
    image.add_argument("--seed", type=int, help="seed of the first picture (default: a new one)")
    image.add_argument("--device", default="cpu", help="such as cuda")
    image.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of the networks")
    reconstruction = _tool(what, "reconstruction", "an image beside what A, and B from z, make of it", _run_reconstruct)
    reconstruction.add_argument("folder", metavar="FOLDER", help="exported cascade with its compressor")
    reconstruction.add_argument("image", metavar="IMAGE", help="image file")
    reconstruction.add_argument("--out", type=Path, required=True, help="image file: original, A, B")
    reconstruction.add_argument("--seed", type=int, default=0, help="seed of Stage B's noise")
    for parser_of_images in (image, reconstruction):
        parser_of_images.add_argument("--steps", type=int, default=12, help="steps of Stage B")


def _tool(commands: Any, name: str, description: str, function: Callable[[Parsed], None]) -> Parser:
    parser: Parser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(run=function)
    return parser


def _add_sources(parser: Parser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=".txt, .md, .jsonl, .parquet (.gz and .zst too), .tar of captioned images, a folder or the URL of them, "
        "builtin:prose or builtin:code",
    )
    parser.add_argument("--text_field", default="text", help="field of .jsonl and column of .parquet with the text")
    parser.add_argument("--overwrite", action="store_true", help="replace what was prepared there")


def _add_engine(parser: Parser) -> None:
    parser.add_argument("--engine", default="local", help="local, or ray for the machines of a cluster")
    parser.add_argument("--ray_address", help="of the cluster (default: RAY_ADDRESS, or one that is started here)")


def _run_prepare_tokenizer(args: Parsed) -> None:
    from ..preparation.tokenizer import train_tokenizer

    size = train_tokenizer(
        args.sources, args.vocab_size, args.out, text_field=args.text_field, overwrite=args.overwrite
    )
    print(f"{args.out}: a tokenizer of {size} tokens")


def _run_prepare_text(args: Parsed) -> None:
    from ..preparation.text import prepare_text

    prepare_text(
        args.sources,
        args.tokenizer,
        args.out,
        sequence_length=args.sequence_length,
        held_out=args.held_out,
        workers=args.workers,
        text_field=args.text_field,
        rows_per_shard=args.rows_per_shard,
        overwrite=args.overwrite,
        engine=args.engine,
        ray_address=args.ray_address,
    )


def _run_prepare_index(args: Parsed) -> None:
    from ..preparation.index import index_shards

    options = {name: getattr(args, name) for name in ("tokenizer", "caption_key", "max_corrupt")}
    options = {name: value for name, value in options.items() if value is not None}
    print(
        index_shards(
            args.shards, args.out, kind=args.kind, workers=args.workers, overwrite=args.overwrite, options=options
        )
    )


def _run_prepare_images(args: Parsed) -> None:
    from ..preparation.images import prepare_images
    from ..preparation.steps.recoding import Recoding

    prepare_images(
        args.source,
        args.out,
        held_out=args.held_out,
        recoding=Recoding(args.image_size, args.format, args.quality),
        workers=args.workers,
        max_corrupt=args.max_corrupt,
        skip_without_caption=args.skip_without_caption,
        image_field=args.image_field,
        caption_field=args.caption_field,
        samples_per_shard=args.samples_per_shard,
        pictures=args.pictures,
        seed=args.seed,
        overwrite=args.overwrite,
        engine=args.engine,
        ray_address=args.ray_address,
    )


def _run_prepare_latents(args: Parsed) -> None:
    from ..preparation.latents import prepare_latents

    options = dict(vars(args))
    for name in ("command", "what", "run", "source", "out", "stage_b", "image_size", "shard_of", "arrays"):
        options.pop(name, None)
    number, slash, processes = args.shard_of.partition("/")
    if not (slash and number.isdigit() and processes.isdigit()):
        raise UsageError(f"shard_of {args.shard_of!r} must be I/N, such as 0/4")
    what, share = args.arrays.split(","), (int(number), int(processes))
    print(prepare_latents(args.source, args.out, args.stage_b, args.image_size, what=what, shard_of=share, **options))


def _run_prepare_verify(args: Parsed) -> None:
    from ..preparation.verify import verify

    problems = verify(args.folder)
    for problem in problems:
        print(problem)
    if problems:
        raise UsageError(f"{args.folder}: {len(problems)} problems; prepare it again")
    print(f"{args.folder}: every shard is as its index says")


def _run_export_hf(args: Parsed) -> None:
    from ..modules.language.hugging_face import export_hugging_face

    export_hugging_face(args.checkpoint, args.out, args.tokenizer, args.overwrite)
    print(f"{args.out}: load it with AutoModelForCausalLM.from_pretrained")


def _run_export_weights(args: Parsed) -> None:
    from ..checkpoints.sharded_writing import consolidate

    print(f"{args.out}: {consolidate(args.checkpoint, args.out, args.prefix)} tensors")


def _run_export_diffusers(args: Parsed) -> None:
    from ..modules.pipeline.export import export_diffusers

    texts = {"text_encoder": args.text_encoder, "prior_text_encoder": args.prior_text_encoder}
    export_diffusers(args.stage_a, args.stage_b, args.stage_c, args.out, args.stage_c_mean, **texts)
    print(f"{args.out}: its README.md says how to load it")


def _run_generate_image(args: Parsed) -> None:
    import torch

    from ..modules.pipeline.prompts import read_prompts
    from ..modules.pipeline.text_to_image import TextToImage

    prompts = read_prompts(args.prompt)
    pipeline = TextToImage.from_folder(args.folder, args.prior, getattr(torch, args.dtype), args.device)
    pictures = pipeline(
        prompts,
        args.height,
        args.width,
        prior_num_inference_steps=args.prior_steps,
        prior_guidance_scale=args.guidance,
        num_inference_steps=args.steps,
        negative_prompt=args.negative_prompt,
        num_images_per_prompt=args.images,
        seed=torch.seed() % 2**31 if args.seed is None else args.seed,
        progress=True,
    )
    images = pictures.images  # type: ignore[union-attr]  # a tuple only with return_dict=False
    for index, picture in enumerate(images):
        out = args.out if len(images) == 1 else args.out.with_stem(f"{args.out.stem}-{index}")
        _save_image(picture, out)


def _run_reconstruct(args: Parsed) -> None:
    from PIL import Image

    from ..datamodules.imaging.decoding import read_image
    from ..modules.pipeline.text_to_image import TextToImage

    pipeline, image = TextToImage.from_folder(args.folder), Image.fromarray(read_image(args.image))
    images = pipeline.reconstruct(image, num_inference_steps=args.steps, seed=args.seed, progress=True)
    width, height = images.original.size
    row = Image.new("RGB", (3 * width, height))
    for index, picture in enumerate(images):
        row.paste(picture, (index * width, 0))
    _save_image(row, args.out)


def _save_image(picture: Any, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out)
    except (OSError, ValueError) as error:
        raise UsageError(f"{out} cannot be written: {error}") from error
    print(out)


def _run_generate_text(args: Parsed) -> None:
    from ..modules.language.hugging_face import generate_text

    print(generate_text(args.folder, args.prompt, args.max_new_tokens, args.temperature, args.top_p, args.seed))
