"""The API of a data set: its pictures as they will be trained, and their captions to edit."""

from typing import Literal
from urllib.parse import urlencode

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from anima_jax.data.media import read_clip
from anima_jax.errors import UserError, one_line, show_value
from anima_jax.serving.http.pictures import as_jpeg
from anima_jax.serving.http.routes import NotFoundError, Strict, api_route
from anima_jax.serving.http.server import server_of
from anima_jax.serving.studio.caption_edits import CaptionKind
from anima_jax.serving.studio.dataset_edits import TagAction
from anima_jax.serving.studio.dataset_pictures import as_png, small_picture, thumbnail_side
from anima_jax.serving.studio.dataset_shown import (
    BucketEntry,
    DatasetSource,
    FilterName,
    PictureEntry,
    ShownDataset,
    TierEntry,
    Wanted,
    picture_entry,
)
from anima_jax.serving.studio.dataset_view import PictureRecord


class PicturesQuery(Wanted):
    """Which pictures, and which part of them."""

    offset: int = Field(0, ge=0, lt=2**31)
    limit: int = Field(60, ge=1, le=500)


class DatasetSummary(BaseModel):
    """The data set. `state` says whether it is being read; what is there is that of the reading before."""

    path: str
    kind: Literal["training", "dataset", "folder"]
    state: Literal["reading", "ready", "failed"]
    read: int = Field(description="files that were looked at, while it is being read")
    error: str
    version: int = Field(description="another number when pictures or captions have changed")
    counts: dict[str, int]
    sources: list[DatasetSource]
    messages: list[str]
    problems: list[str]
    buckets: list[BucketEntry]
    tiers: list[TierEntry]
    table: list[str] = Field(description="the lines that training prints")
    steps_of_first_epoch: int
    steps: int
    token_limit: int
    undo: str


class PicturePage(BaseModel):
    """Pictures in the data set's order; `total` of them fit what was asked for."""

    total: int
    pictures: list[PictureEntry]


class CaptionEntry(BaseModel):
    """A caption of a picture, and the file that it is in; `why` says why it cannot be edited."""

    text: str
    kind: CaptionKind
    file: str = ""
    editable: bool = False
    why: str = ""


class PictureDetail(PictureEntry):
    """A picture with all its captions. `version` changes with them; `trained` are addresses of what is trained."""

    version: str
    token_limit: int
    captions: list[CaptionEntry]
    texts: list[str] = Field(description="what is trained, with prefix, before tags are shuffled or dropped")
    trained: list[str]


class CaptionBody(Strict):
    """The new text of a picture's caption."""

    text: str = Field(max_length=100_000)
    index: int = Field(0, ge=0, lt=1000, description="which of the picture's captions")
    version: str | None = Field(None, max_length=100, description="as If-Match: refuse if the captions have changed")


class TagsQuery(BaseModel):
    """Which tags."""

    search: str = Field("", max_length=1000)
    limit: int = Field(200, ge=1, le=10_000)


class TagCount(BaseModel):
    """A tag, and in how many captions it is."""

    tag: str
    count: int


class TagList(BaseModel):
    """Tags, the most frequent first."""

    total: int
    tags: list[TagCount]


class TagBody(Strict):
    """A change of a tag in many captions. Without `expected` nothing changes, and the answer says what would."""

    action: TagAction
    tag: str = Field(min_length=1, max_length=1000)
    to: str = Field("", max_length=1000, description="the new name")
    search: str = Field("", max_length=1000)
    filter: FilterName = ""
    bucket: str = Field("", max_length=100)
    with_tag: str = Field("", max_length=1000)
    source: int | None = Field(None, ge=0, lt=10_000)
    expected: int | None = Field(None, ge=0, lt=2**31, description="how many captions change: then they do")


class ChangedCaption(BaseModel):
    """A caption before and after."""

    id: str
    name: str
    before: str
    after: str


class TagChanges(BaseModel):
    """How many captions change, or have changed, and the first of them."""

    changes: int
    done: bool
    first: list[ChangedCaption]


class UndoAnswer(BaseModel):
    """What was taken back, and a line for each file that was changed meanwhile and stays."""

    what: str
    refused: list[str]


class DuplicatesAnswer(BaseModel):
    """Groups of pictures that look alike, as far as they are compared."""

    state: Literal["searching", "done"]
    compared: int
    total: int
    groups: list[list[PictureEntry]]


class ThumbnailQuery(BaseModel):
    """How large."""

    size: int = Field(256, ge=16, le=4096, description="longest side in pixels, rounded up to one of a few")
    version: str | None = Field(None, max_length=100)


class TrainedQuery(BaseModel):
    """Which of the picture's buckets."""

    bucket: int = Field(0, ge=0, lt=1000)
    version: str | None = Field(None, max_length=100)


def _shown(request: Request) -> ShownDataset:
    shown: ShownDataset | None = request.app.state.dataset
    if shown is None:
        raise NotFoundError("the server shows no data set, expected --dataset FILE at its start")
    return shown


def _record(request: Request) -> PictureRecord:
    record = _shown(request).view.reading.by_id.get(request.path_params["id"])
    if record is None:
        raise NotFoundError("there is no such picture, or no longer")
    return record


async def show_dataset(request: Request) -> DatasetSummary:
    shown, server = _shown(request), server_of(request)
    return await server.in_studio(lambda: DatasetSummary(**shown.summary(is_local=server.config.is_local)))


async def reload_dataset(request: Request) -> DatasetSummary:
    _shown(request).view.read()
    return await show_dataset(request)


async def list_pictures(request: Request, query: PicturesQuery) -> PicturePage:
    shown = _shown(request)

    def page() -> PicturePage:
        found, plan = shown.select(query), shown.view.plan()
        part = found[query.offset : query.offset + query.limit]
        return PicturePage(total=len(found), pictures=[picture_entry(record, plan) for record in part])

    return await server_of(request).in_studio(page)


async def show_picture(request: Request) -> Response:
    return await server_of(request).in_studio(_detail, request)


def _detail(request: Request) -> Response:
    shown, record = _shown(request), _record(request)
    editor, plan = shown.editor, shown.view.last_plan
    why, fields, version = "", [], ""
    try:
        fields, version = editor.fields(record), editor.version(record)
    except UserError as error:
        why = one_line(error)
    captions = [
        CaptionEntry(text=f.text, kind=f.kind, file=one_line(f.place.name), editable=not reason, why=reason)
        for f in fields
        for reason in [editor.why_not(record, f)]
    ]
    if not captions:
        in_tar = any(place.in_tar for place in record.candidate.places())
        why = why or f"its captions are in {'a tar' if in_tar else 'a data set'} that is not edited here"
        captions = [CaptionEntry(text=text, kind="tags", why=why) for text in record.captions.tags]
        captions += [CaptionEntry(text=text, kind="nl", why=why) for text in record.captions.nl]
        captions = captions or [CaptionEntry(text="", kind="tags", why=why)]
    entry = picture_entry(record, plan)
    address = f"/api/dataset/pictures/{record.id}/trained.png?{urlencode({'version': record.version})}"
    answer = PictureDetail(
        **entry.model_dump(),
        version=version,
        token_limit=shown.view.token_limit,
        captions=captions,
        texts=list(dict.fromkeys(text for example in record.examples for text in example.captions)),
        trained=[f"{address}&bucket={number}" for number in range(len(entry.buckets))],
    )
    return Response(answer.model_dump_json(), media_type="application/json", headers={"ETag": f'"{version}"'})


async def edit_caption(request: Request, body: CaptionBody) -> Response:
    given = request.headers.get("if-match", "").strip().removeprefix("W/").strip('"')
    version = body.version if body.version is not None else given if given not in {"", "*"} else None

    def edit() -> Response:
        record = _record(request)
        try:
            _shown(request).editor.edit(record, body.index, body.text, version)
        except IndexError:
            raise UserError(f"index {body.index}: the picture has fewer captions") from None
        return _detail(request)

    return await server_of(request).in_studio(edit)


async def list_tags(request: Request, query: TagsQuery) -> TagList:
    shown = _shown(request)

    def tags() -> TagList:
        word = query.search.casefold()
        found = [(tag, count) for tag, count in shown.view.plan().tags.items() if word in tag.casefold()]
        return TagList(total=len(found), tags=[TagCount(tag=tag, count=count) for tag, count in found[: query.limit]])

    return await server_of(request).in_studio(tags)


async def change_tags(request: Request, body: TagBody) -> TagChanges:
    shown = _shown(request)
    if body.action == "rename" and not body.to.strip():
        raise UserError("to: is missing, expected the new name of the tag")
    for name in ("tag", "to"):
        if any(letter in getattr(body, name) for letter in ",\n\r"):
            raise UserError(f"{name} {show_value(getattr(body, name))}: expected one tag, without a comma")
    if not body.tag.strip():
        raise UserError("tag: is empty, expected a tag")

    def change() -> TagChanges:
        about = {name: getattr(body, name) for name in ("search", "filter", "bucket", "source")}
        records = shown.select(Wanted(**about, tag=body.with_tag))
        found = shown.editor.tag_changes(body.action, body.tag, body.to, records)
        if body.expected is not None:
            what = {"add": "adding", "remove": "removing", "rename": "renaming"}[body.action]
            shown.editor.apply(f"{what} {body.tag.strip()} in {len(found)} captions", found, body.expected)
        first = [
            ChangedCaption(id=each.record.id, name=each.record.name, before=each.field.text, after=each.after)
            for each in found[:5]
        ]
        return TagChanges(changes=len(found), done=body.expected is not None, first=first)

    return await server_of(request).in_studio(change)


async def undo_edit(request: Request) -> UndoAnswer:
    def undo() -> UndoAnswer:
        try:
            what, refused = _shown(request).editor.undo()
        except LookupError:
            raise NotFoundError("there is nothing to undo") from None
        return UndoAnswer(what=what, refused=refused)

    return await server_of(request).in_studio(undo)


async def find_duplicates(request: Request) -> DuplicatesAnswer:
    return await server_of(request).in_studio(_shown(request).duplicates_answer, DuplicatesAnswer)


async def show_thumbnail(request: Request, query: ThumbnailQuery) -> Response:
    record, side = _record(request), thumbnail_side(query.size)

    def make() -> bytes:
        return as_jpeg(small_picture(record.candidate.media, side), 88)

    return await _shown(request).pictures.response(
        server_of(request), (record.id, record.version, side), make, "image/jpeg"
    )


async def show_trained(request: Request, query: TrainedQuery) -> Response:
    record = _record(request)
    buckets = list(dict.fromkeys(example.bucket for example in record.examples))
    if query.bucket >= len(buckets):
        raise NotFoundError(f"there is no bucket {query.bucket} of this picture")
    media, size = record.candidate.media, buckets[query.bucket].size

    def make() -> bytes:
        return as_png(read_clip(media.read(), size, name=media.name)[0])

    return await _shown(request).pictures.response(
        server_of(request), (record.id, record.version, size), make, "image/png"
    )


def routes() -> list[Route]:
    """Return the routes of a data set."""
    all_, picture = "/api/dataset", "/api/dataset/pictures/{id}"
    missing = (404,)
    return [
        api_route(all_, "GET", show_dataset, "The data set", answer=DatasetSummary, errors=missing),
        api_route(
            *(f"{all_}/reload", "POST", reload_dataset, "Read the data set again"),
            answer=DatasetSummary,
            errors=missing,
        ),
        api_route(
            *(f"{all_}/pictures", "GET", list_pictures, "Its pictures"),
            query=PicturesQuery,
            answer=PicturePage,
            errors=missing,
        ),
        api_route(picture, "GET", show_picture, "A picture with its captions", answer=PictureDetail, errors=missing),
        api_route(
            *(f"{picture}/caption", "PUT", edit_caption, "Change a caption"),
            body=CaptionBody,
            answer=PictureDetail,
            errors=(404, 412),
        ),
        api_route(
            *(f"{picture}/thumbnail.jpg", "GET", show_thumbnail, "A small copy"),
            query=ThumbnailQuery,
            answer="image/jpeg",
            errors=missing,
        ),
        api_route(
            *(f"{picture}/trained.png", "GET", show_trained, "The pixels that are trained"),
            query=TrainedQuery,
            answer="image/png",
            errors=missing,
        ),
        api_route(f"{all_}/tags", "GET", list_tags, "Tags", query=TagsQuery, answer=TagList, errors=missing),
        api_route(
            *(f"{all_}/tags", "POST", change_tags, "Add, remove or rename a tag in many captions"),
            body=TagBody,
            answer=TagChanges,
            errors=(404, 412),
        ),
        api_route(f"{all_}/undo", "POST", undo_edit, "Take the last edit back", answer=UndoAnswer, errors=missing),
        api_route(
            *(f"{all_}/duplicates", "GET", find_duplicates, "Pictures that look alike"),
            answer=DuplicatesAnswer,
            errors=missing,
        ),
    ]
