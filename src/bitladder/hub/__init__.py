"""The Hugging Face hub: which file of a repository a name means, fetching it, and uploading files."""

from bitladder.hub.download import Fetched, HubName, fetch, parse
from bitladder.hub.transfer import upload

__all__ = ["Fetched", "HubName", "fetch", "parse", "upload"]
