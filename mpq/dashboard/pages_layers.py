"""The page of layers across runs."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse

from mpq.core.errors import InvalidInputError
from mpq.dashboard.layers_view import LayersView, Order, layers_view
from mpq.dashboard.problems import problem_of
from mpq.dashboard.site import Site
from mpq.dashboard.templating import page
from mpq.store.layer_counts import counted_models

Text = Annotated[str | None, Query(max_length=500)]
Bits = Annotated[int | None, Query(ge=1, le=64)]


def routes(site: Site) -> APIRouter:
    """Return the page of layers."""
    router = APIRouter(include_in_schema=False)

    @router.get("/layers")
    def layers(
        model: Text = None,
        metric: Text = None,
        budget: Text = None,
        tag: Annotated[list[str] | None, Query(max_length=20)] = None,
        name: Text = None,
        since: Text = None,
        bits: Bits = None,
        order: Order = "network",
        at: Annotated[int, Query(alias="page", ge=1, le=10**9)] = 1,
    ) -> HTMLResponse:
        """Show how often runs of one model gave each layer how many bits."""
        models = counted_models(site.store)
        if model is None and models:
            model = max(models, key=lambda one: models[one])
        texts = {"metric": metric, "budget": budget, "name": name, "since": since}
        wanted: dict[str, Any] = {key: text for key, text in texts.items() if text}
        tags = [text for text in tag or () if text]
        asked = {"model": model or "", **texts, "tag": tags, "bits": bits, "order": order}
        context = {
            "models": models,
            "asked": asked,
            "tags": tags,
            "same": urlencode({k: v for k, v in asked.items() if v}, doseq=True),
        }
        view: LayersView | None = None
        error, status = "", 200
        if models:
            try:
                view = layers_view(
                    site.store, {"model": model, **wanted, "tag": tags}, bits, order, at
                )
            except InvalidInputError as found:
                error, status = str(found), problem_of(found).status_code
                status = 200 if found.code == "no_runs" else status
        return page("layers.html", status=status, view=view, error=error, **context)

    return router
