"""Chats as ids and masks: forms and messages say what a record means, rendering runs the template, spans finds the answers."""

from qat.data.chat.masked import Chats, Encoded, encode, read_chats

__all__ = ["Chats", "Encoded", "encode", "read_chats"]
