"""The embedded reference domain: scenes, an oracle that reads them, and the shipped models."""
