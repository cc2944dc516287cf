"""The offline side: from text and a model to an explained feature bank."""
