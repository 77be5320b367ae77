from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ContractsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Contract(_message.Message):
    __slots__ = ("signed",)
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    signed: bytes
    def __init__(self, signed: _Optional[bytes] = ...) -> None: ...

class HeadsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Head(_message.Message):
    __slots__ = ("site", "domain", "sequence", "hash", "witness")
    SITE_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    WITNESS_FIELD_NUMBER: _ClassVar[int]
    site: str
    domain: str
    sequence: int
    hash: bytes
    witness: bytes
    def __init__(self, site: _Optional[str] = ..., domain: _Optional[str] = ..., sequence: _Optional[int] = ..., hash: _Optional[bytes] = ..., witness: _Optional[bytes] = ...) -> None: ...

class EntriesRequest(_message.Message):
    __slots__ = ("site",)
    SITE_FIELD_NUMBER: _ClassVar[int]
    site: str
    def __init__(self, site: _Optional[str] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("since", "link")
    SINCE_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    since: bytes
    link: Link
    def __init__(self, since: _Optional[bytes] = ..., link: _Optional[_Union[Link, _Mapping]] = ...) -> None: ...

class Link(_message.Message):
    __slots__ = ("sequence", "body_hash", "body")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BODY_HASH_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    body_hash: bytes
    body: bytes
    def __init__(self, sequence: _Optional[int] = ..., body_hash: _Optional[bytes] = ..., body: _Optional[bytes] = ...) -> None: ...

class UpdatesRequest(_message.Message):
    __slots__ = ("site",)
    SITE_FIELD_NUMBER: _ClassVar[int]
    site: str
    def __init__(self, site: _Optional[str] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("received",)
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    received: bytes
    def __init__(self, received: _Optional[bytes] = ...) -> None: ...

class ConsistencyRequest(_message.Message):
    __slots__ = ("site", "domain", "first", "second")
    SITE_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    SECOND_FIELD_NUMBER: _ClassVar[int]
    site: str
    domain: str
    first: int
    second: int
    def __init__(self, site: _Optional[str] = ..., domain: _Optional[str] = ..., first: _Optional[int] = ..., second: _Optional[int] = ...) -> None: ...
